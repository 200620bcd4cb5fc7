"""bitmill import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitmill.cli.options import AsJson, TrustRemoteCode
from bitmill.cli.output import command_output, property_table
from bitmill.cli.quantize import Overwrite

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Folder of GPTQ, AWQ, compressed-tensors, bitsandbytes (NF4), fp8, ModelOpt or MLX, or a .gguf file.",
        show_default=False,
    ),
]
Out = Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder to write.", show_default=False)]


def import_checkpoint(
    source: Source,
    out: Out,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Bring a checkpoint that another program quantized into a folder, without quantizing again."""
    with command_output(as_json) as output:
        from bitmill import api

        result = api.import_checkpoint(
            source, out, overwrite=overwrite, trust_remote_code=trust_remote_code, progress=output.progress
        )
        output.result(result.to_dict(), lambda: [property_table(result.rows())])
