"""bitmill bench kernels, bitmill bench decode and bitmill bench prefill."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from bitmill.cli.options import AsJson, TrustRemoteCode
from bitmill.cli.output import facts, megabytes, number, working
from bitmill.errors import UsageError

app = typer.Typer(help="Measure how fast kernels and quantized models run.", no_args_is_help=True)

Folder = Annotated[str, typer.Argument(help="Quantized folder.", show_default=False)]


@app.command("kernels")
def kernels(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OUTxIN", help="Size of the layer; repeatable.", show_default="4096x4096, 4096x11008"
        ),
    ] = None,
    format: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this format; repeatable.", show_default="all")
    ] = None,
    bits: Annotated[
        list[int] | None, typer.Option(metavar="B", help="Only this width; repeatable.", show_default="all")
    ] = None,
    tokens: Annotated[int, typer.Option(metavar="N", help="Tokens in a batch.")] = 1,
    turns: Annotated[int, typer.Option(metavar="N", help="Measurements, whose median is reported.")] = 7,
    as_json: AsJson = False,
) -> None:
    """Time the kernels of all formats beside torch's fp32 layer and the memory's read bandwidth."""
    shapes = tuple(_shape(text) for text in shape) if shape else None
    if tokens < 1 or turns < 1:
        raise UsageError(f"--tokens is {tokens} and --turns is {turns}; use at least 1 of each.")
    with working(as_json) as output:
        output.progress.start("starting", 0)
        from bitmill.workflows.bench.kernels import CASES, SHAPES, bench_kernels

        known = sorted({name for name, _, _ in CASES})
        if unknown := [name for name in format or [] if name not in known]:
            raise UsageError(f"--format is {unknown[0]!r}; use one of {', '.join(known)}.")
        result = bench_kernels(
            shapes or SHAPES,
            tuple(format or ()),
            tuple(bits or ()),
            tokens,
            turns,
            lambda name: output.progress.start(name, 0),
        )
        output.result(result, lambda: [_machine(result), _table(result)])


@app.command("decode")
def decode(
    model: Folder,
    tokens: Annotated[int, typer.Option(metavar="N", help="Tokens to decode.")] = 64,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Tokens a second of a quantized model, and of the same model with its weights unpacked to fp32."""
    with working(as_json) as output:
        output.progress.start(f"decoding with {model}", 0)
        from bitmill.workflows.bench.decode import bench_decode

        result = bench_decode(model, tokens, trust_remote_code)
        rows = [
            ("path", "compiled step" if result["path"] == "step" else result["path"]),
            ("packed", f"{number(result['tokens_per_s'])} tokens/s"),
            ("float", f"{number(result['float_tokens_per_s'])} tokens/s"),
            ("ratio", number(result["ratio"])),
            ("peak memory", megabytes(result["peak_memory_bytes"])),
        ]
        output.result(result, lambda: [facts(rows)])


@app.command("prefill")
def prefill(
    model: Folder,
    tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of the prompt.")] = 512,
    turns: Annotated[int, typer.Option(metavar="N", help="Measurements, whose median is reported.")] = 5,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Time to read a prompt and choose the next token, of a quantized model and of the same model in fp32."""
    with working(as_json) as output:
        output.progress.start(f"reading a prompt with {model}", 0)
        from bitmill.workflows.bench.prefill import bench_prefill

        result = bench_prefill(model, tokens, turns, trust_remote_code)
        rows = [
            ("packed", f"{number(result['tokens_per_s'])} tokens/s"),
            ("float", f"{number(result['float_tokens_per_s'])} tokens/s"),
            ("ratio", number(result["ratio"])),
            ("first token after", f"{number(result['time_to_first_token_s'])} s"),
            ("first call", f"{number(result['first_call_s'])} s"),
            ("peak memory", megabytes(result["peak_memory_bytes"])),
        ]
        output.result(result, lambda: [facts(rows)])


def _shape(text: str) -> tuple[int, int]:
    out, _, inputs = text.partition("x")
    if not (out.isdigit() and inputs.isdigit() and int(out) and int(inputs)):
        raise UsageError(f"--shape is {text!r}; write it as OUTxIN, such as 4096x11008.")
    return int(out), int(inputs)


def _machine(result: dict[str, Any]) -> Any:
    rows = [
        ("read bandwidth", f"{number(result['read_bandwidth_GBps'])} GB/s, {result['threads']} threads"),
        ("kernels", f"{result['isa'] or 'reference'}, {result['activations']} activations"),
    ]
    return facts(rows)


def _table(result: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("format", "bits", "group", "shape", "kernel", "ms", "GB/s", "of bandwidth", "x torch fp32"):
        table.add_column(name, justify="left" if name in ("format", "kernel") else "right")
    for case in result["kernels"]:
        table.add_row(
            case["format"],
            str(case["bits"]),
            str(case["group_size"]),
            "x".join(map(str, case["shape"])),
            case["kernel"],
            f"{1e3 * case['time_s']:.3f}",
            f"{case['GBps']:.1f}",
            f"{case['fraction_of_read_bandwidth']:.0%}",
            f"{case['speedup_vs_torch_fp32']:.1f}",
        )
    return table
