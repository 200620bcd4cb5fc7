"""A typer application whose commands all have --verbose and --quiet."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from bitmill.cli.verbosity import verbosity

OUTPUT_PANEL = "Output"

Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Print a debug log on stderr.", rich_help_panel=OUTPUT_PANEL),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print the result and errors alone.", rich_help_panel=OUTPUT_PANEL),
]


class App(typer.Typer):
    """A typer application that adds --verbose and --quiet to its commands."""

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:
        """Return a decorator that registers a function as a command, see `typer.Typer.command`."""
        register = super().command(name, **settings)

        def decorate(function: Callable[..., None]) -> Callable[..., None]:
            register(with_verbosity(function))
            return function

        return decorate


def with_verbosity(function: Callable[..., None]) -> Callable[..., None]:
    """Return the function of a command with the further parameters `verbose` and `quiet`."""
    signature = inspect.signature(function, eval_str=True)
    added = {"verbose": Verbose, "quiet": Quiet}

    @functools.wraps(function)
    def command(verbose: bool = False, quiet: bool = False, **arguments: Any) -> None:
        with verbosity(verbose, quiet):
            function(**arguments)

    parameters = [
        *signature.parameters.values(),
        *(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
            for name, kind in added.items()
        ),
    ]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {**{p.name: p.annotation for p in parameters}, "return": None}
    return command
