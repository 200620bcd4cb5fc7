"""A typer application whose commands have --verbose and --quiet, groups of options, and examples."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from bitmill.cli.help import epilog, in_panel, panel_of_command
from bitmill.cli.verbosity import verbosity

Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print a debug log on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the result and errors alone.")]


class App(typer.Typer):
    """A typer application that adds --verbose and --quiet to its commands, and completes their help.

    Args:
        words: before the names of its commands on the command line, such as "bench".
        settings: of `typer.Typer`.
    """

    def __init__(self, words: str = "", **settings: Any) -> None:
        super().__init__(**settings)
        self.words = words

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:
        """Return a decorator that registers a function as a command, see `typer.Typer.command`."""
        full_name = f"{self.words} {name}".strip()
        settings = {"epilog": epilog(full_name), "rich_help_panel": panel_of_command(full_name), **settings}
        register = super().command(name, **settings)

        def decorate(function: Callable[..., None]) -> Callable[..., None]:
            register(complete_command(function, full_name))
            return function

        return decorate


def complete_command(function: Callable[..., None], name: str) -> Callable[..., None]:
    """Return the function of a command with options in groups, `verbose` and `quiet` among them."""
    signature = inspect.signature(function, eval_str=True)
    added = {"verbose": Verbose, "quiet": Quiet}

    @functools.wraps(function)
    def command(verbose: bool = False, quiet: bool = False, **arguments: Any) -> None:
        with verbosity(verbose, quiet):
            function(**arguments)

    parameters = [
        *signature.parameters.values(),
        *(
            inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
            for option, kind in added.items()
        ),
    ]
    parameters = [p.replace(annotation=in_panel(p.annotation, p.name, name)) for p in parameters]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {**{p.name: p.annotation for p in parameters}, "return": None}
    return command
