"""bitmill lint."""

from __future__ import annotations

from typing import Annotated

import typer

from bitmill.cli.options import AsJson, MethodSettings, TrustRemoteCode, parse_method_options
from bitmill.cli.output import command_output, property_table

Model = Annotated[
    str,
    typer.Argument(
        metavar="DIR", help="Quantized folder, .gguf file, or with --method a float model.", show_default=False
    ),
]
EngineName = Annotated[
    str,
    typer.Option("--engine", metavar="ENGINE", help="vllm, sglang, llama.cpp, transformers or mlx.",
                 show_default=False),
]  # fmt: skip
MethodName = Annotated[
    str | None,
    typer.Option(
        "--method", metavar="NAME", help="Judge what a method or recipe file would make.", show_default=False
    ),
]


def lint(
    model: Model,
    engine: EngineName,
    method: MethodName = None,
    settings: MethodSettings = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Say whether an engine will load a quantized folder, before a long run or an upload."""
    with command_output(as_json) as output:
        from bitmill.workflows.lint.run import lint as judge

        options = parse_method_options(None, None, settings)
        result = judge(model, engine, method=method, options=options, trust_remote_code=trust_remote_code)
        output.result(result.to_dict(), lambda: [property_table(result.rows())])
    if not result.loads:
        raise typer.Exit(1)
