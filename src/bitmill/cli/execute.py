"""bitmill exec."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from bitmill.errors import UsageError, one_line

Program = Annotated[
    list[str],
    typer.Argument(metavar="PROGRAM [ARGUMENT]...", help="Program of this environment; put -- before it."),
]


def execute(program: Program) -> None:
    """Run another Python program that can open bitmill's folders, such as lm_eval or a notebook server."""
    run_program(program)


def run_program(program: list[str]) -> NoReturn:
    """Replace this process by a program with bitmill's format registered in it and in its children.

    Args:
        program: name and arguments.

    Raises:
        UsageError: the program cannot be run.
    """
    import bitmill.integrations.startup as startup

    folder = str(Path(startup.__file__).parent)
    path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
    try:
        os.execvpe(program[0], program, {**os.environ, "PYTHONPATH": path})
    except OSError as error:
        raise UsageError(
            f"{program[0]!r} cannot be run ({one_line(error)}); check its name, and that it is installed."
        ) from None
