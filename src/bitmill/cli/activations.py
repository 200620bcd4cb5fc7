"""The option --activations of commands that run models."""

from __future__ import annotations

import os
from functools import partial
from typing import Annotated

import typer

VARIABLE = "BITMILL_ACTIVATIONS"  # which layers read


def _choose(context: typer.Context, name: str | None) -> str | None:
    """Set the variable until the command ends."""
    if name is not None:
        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = name
        context.call_on_close(partial(_restore, before))
    return name


def _restore(value: str | None) -> None:
    if value is None:
        os.environ.pop(VARIABLE, None)
    else:
        os.environ[VARIABLE] = value


Activations = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE",
        envvar=VARIABLE,
        callback=_choose,
        help="Type that inputs of packed layers are rounded to where the recipe rounds none: int8, int16 or "
        "float32; without it int8 for up to 16 tokens at a time, and int16 for more.",
        show_default=False,
    ),
]
