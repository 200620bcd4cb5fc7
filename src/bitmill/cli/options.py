"""Options that mean the same in every command."""

from __future__ import annotations

from typing import Annotated

import typer

Device = Annotated[str, typer.Option(help="cpu or cuda.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
HeadBits = Annotated[
    int | None,
    typer.Option(
        metavar="8|6|4",
        help="Bits of token embeddings and output head; in float when left out.",
        show_default=False,
    ),
]
