"""bitmill export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitmill.cli.options import AsJson, QuantizedFolder, TrustRemoteCode
from bitmill.cli.output import command_output, property_table

To = Annotated[
    str,
    typer.Option(
        metavar="TARGET",
        help="dense for an ordinary model in float, gguf, gptq, awq, compressed-tensors or mlx.",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--out",
        help="Folder to write, a file for gguf; without it DIR-TARGET, or DIR.gguf, next to DIR.",
        show_default=False,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE",
        help="float16, bfloat16 or float32 for what stays in float; without it the type of the folder's config.",
        show_default=False,
    ),
]


def export(
    folder: QuantizedFolder,
    to: To,
    out: Out = None,
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Write a quantized folder as a checkpoint of other programs, without quantizing again."""
    with command_output(as_json) as output:
        from bitmill import api

        result = api.export(
            folder, to, out, dtype=dtype, trust_remote_code=trust_remote_code, progress=output.progress
        )
        output.result(result.to_dict(), lambda: [property_table(result.rows())])
