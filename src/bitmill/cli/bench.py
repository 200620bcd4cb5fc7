"""bitmill bench kernels, bitmill bench formats, bitmill bench decode and bitmill bench prefill."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from bitmill.cli.activations import Activations, rounded_to
from bitmill.cli.app import App
from bitmill.cli.options import AsJson, TrustRemoteCode
from bitmill.cli.output import command_output, data_table, property_table
from bitmill.errors import UsageError
from bitmill.report.text import format_mb, format_number

app = App(
    "bench",
    help="Measure the speed of kernels and quantized models, and the error of formats.",
    no_args_is_help=True,
)

Folder = Annotated[str, typer.Argument(help="Quantized folder.", show_default=False)]
Shapes = Annotated[
    list[str] | None,
    typer.Option("--shape", metavar="OUTxIN", help="Size of the layer; repeatable.",
                 show_default="4096x4096, 4096x11008"),
]  # fmt: skip
Formats = Annotated[
    list[str] | None,
    typer.Option("--format", metavar="NAME", help="Only this format; repeatable.", show_default="all"),
]
Bits = Annotated[
    list[int] | None, typer.Option(metavar="B", help="Only this number of bits; repeatable.", show_default="all")
]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL", help="Round a layer of this model, in a Hadamard basis.", show_default="Gaussian"
    ),
]
Batch = Annotated[int, typer.Option(metavar="N", help="Tokens in a batch.")]
NewTokens = Annotated[int, typer.Option(metavar="N", help="Tokens to decode.")]
PromptTokens = Annotated[int, typer.Option(metavar="N", help="Tokens of the prompt.")]
Turns = Annotated[int, typer.Option(metavar="N", help="Number of measurements; their median is reported.")]


@app.command("kernels")
def kernels(
    shapes: Shapes = None,
    formats: Formats = None,
    bits: Bits = None,
    tokens: Batch = 1,
    turns: Turns = 7,
    as_json: AsJson = False,
) -> None:
    """Time the kernels of all formats, torch's fp32 layer and the memory's read bandwidth."""
    parsed = tuple(_parse_shape(text) for text in shapes or [])
    with command_output(as_json) as output:
        output.progress.start("starting", 0)
        from bitmill.workflows.bench.kernels import SHAPES, bench_kernels

        result = bench_kernels(
            parsed or SHAPES,
            tuple(formats or ()),
            tuple(bits or ()),
            tokens,
            turns,
            lambda name: output.progress.start(name, 0),
        )
        output.result(result, lambda: [_machine_table(result), _kernel_table(result)])


@app.command("formats")
def formats(
    model: Model = None,
    formats: Formats = None,
    bits: Bits = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure the error of all formats on Gaussian numbers, above the rate-distortion bound."""
    with command_output(as_json) as output:
        output.progress.start("starting", 0)
        from bitmill.workflows.bench.formats import bench_formats

        result = bench_formats(
            model,
            tuple(formats or ()),
            tuple(bits or ()),
            lambda name: output.progress.start(name, 0),
            trust_remote_code,
        )
        output.result(result, lambda: [_format_table(result)])


@app.command("decode")
def decode(
    model: Folder,
    tokens: NewTokens = 64,
    activations: Activations = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure tokens per second of a quantized model, and of this model with its weights unpacked to fp32."""
    with command_output(as_json) as output, rounded_to(activations):
        output.progress.start(f"decoding with {model}", 0)
        from bitmill.workflows.bench.models import bench_decode

        result = bench_decode(model, tokens, trust_remote_code)
        rows = [
            ("path", "compiled step" if result["path"] == "step" else result["path"]),
            *_speed_rows(result),
            ("peak memory", format_mb(result["peak_memory_bytes"])),
        ]
        output.result(result, lambda: [property_table(rows)])


@app.command("prefill")
def prefill(
    model: Folder,
    tokens: PromptTokens = 512,
    turns: Turns = 5,
    activations: Activations = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure the time to read a prompt, of a quantized model and of this model in fp32."""
    with command_output(as_json) as output, rounded_to(activations):
        output.progress.start(f"reading a prompt with {model}", 0)
        from bitmill.workflows.bench.models import bench_prefill

        result = bench_prefill(model, tokens, turns, trust_remote_code)
        rows = [
            *_speed_rows(result),
            ("time to first token", f"{format_number(result['time_to_first_token_s'])} s"),
            ("first call", f"{format_number(result['first_call_s'])} s"),
            ("peak memory", format_mb(result["peak_memory_bytes"])),
        ]
        output.result(result, lambda: [property_table(rows)])


def _parse_shape(text: str) -> tuple[int, int]:
    from bitmill.config.options import is_count

    out, _, inputs = text.partition("x")
    if not (is_count(out) and is_count(inputs) and int(out) and int(inputs)):
        raise UsageError(f"--shape is {text!r}; write it as OUTxIN, such as 4096x11008.")
    return int(out), int(inputs)


def _speed_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("activations", result["activations"]),
        ("packed", f"{format_number(result['tokens_per_s'])} tokens/s"),
    ]
    if result["float_left_out"]:
        return [*rows, ("float", f"not measured. {result['float_left_out']}")]
    floats = f"{format_number(result['float_tokens_per_s'])} tokens/s"
    return [*rows, ("float", floats), ("ratio", format_number(result["ratio"]))]


def _machine_table(result: dict[str, Any]) -> Any:
    bandwidth = f"{format_number(result['read_bandwidth_GBps'])} GB/s, {result['threads']} threads"
    isa = f"{result['isa'] or 'reference'}, {result['activations']} activations"
    return property_table([("read bandwidth", bandwidth), ("kernels", isa)])


def _kernel_table(result: dict[str, Any]) -> Any:
    rows = [
        (
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
        for case in result["kernels"]
    ]
    columns = ("format", "bits", "group", "shape", "kernel", "ms", "GB/s", "of bandwidth", "x torch fp32")
    return data_table(columns, rows, left=("format", "kernel"))


def _format_table(result: dict[str, Any]) -> Any:
    rows = [
        (
            case["format"],
            str(case["bits"]),
            str(case["group_size"]),
            f"{case['bits_per_weight']:.3f}",
            f"{case['error']:.5f}",
            f"{case['excess_dB']:.2f}",
            format_number(case["weights_per_s"]),
        )
        for case in result["formats"]
    ]
    columns = ("format", "bits", "group", "bits/weight", "error", "dB above bound", "weights/s")
    return data_table(columns, rows, left=("format",))
