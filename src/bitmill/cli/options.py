"""Options that mean the same in every command."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from bitmill.errors import UsageError

Device = Annotated[str, typer.Option(help="cpu or cuda.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Kv = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Pack keys and values by this method (see bitmill methods).", show_default=False
    ),
]
KvBits = Annotated[int | None, typer.Option(metavar="B", help="Short for --kv-set bits=B.", show_default=False)]
KvSet = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="Option of the KV method; repeatable.", show_default=False),
]
KvSamples = Annotated[int, typer.Option(metavar="N", help="Windows that calibrate keys and values.")]
KvSeqlen = Annotated[
    int | None,
    typer.Option(
        metavar="L", help="Tokens in such a window; 2048, or as many as the model reads.", show_default=False
    ),
]
HeadBits = Annotated[
    int | None,
    typer.Option(
        metavar="8|6|4",
        help="Bits of token embeddings and output head; in float when left out.",
        show_default=False,
    ),
]


def pairs(settings: list[str] | None, flag: str = "--set") -> dict[str, Any]:
    """KEY=VALUE of a repeatable option, values as strings. Raises UsageError."""
    options: dict[str, Any] = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key.isidentifier():
            example = "damp=0.05" if flag == "--set" else "sink=2"
            raise UsageError(f"{flag} wants KEY=VALUE, not {setting!r}; for example {flag} {example}.")
        if key in options:
            raise UsageError(
                f"{flag} gives {key!r} twice, as {options[key]!r} and {value.strip()!r}; give it once."
            )
        options[key] = value.strip()
    return options
