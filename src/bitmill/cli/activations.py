"""The option --activations of commands that run models."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

VARIABLE = "BITMILL_ACTIVATIONS"  # which layers read

Activations = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE",
        envvar=VARIABLE,
        help="Type that inputs of packed layers are rounded to where the recipe rounds none: int8, int16 or "
        "float32; without it, or with recipe, int8 for up to 16 tokens at a time, and int16 for more.",
        show_default=False,
    ),
]


@contextmanager
def rounded_to(name: str | None) -> Iterator[None]:
    """Round inputs to a type inside the block; None changes nothing."""
    before = os.environ.get(VARIABLE)
    if name is not None:
        os.environ[VARIABLE] = name
    try:
        yield
    finally:
        if before is not None:
            os.environ[VARIABLE] = before
        else:
            os.environ.pop(VARIABLE, None)
