"""bitmill plan."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from bitmill.cli.complete import complete_kv, complete_method, complete_plannable
from bitmill.cli.options import (
    AsJson,
    HeadBits,
    MethodSettings,
    TrustRemoteCode,
    parse_bytes,
    parse_head_bits,
    parse_method_options,
    parse_tokens,
)
from bitmill.cli.output import command_output, data_table, property_table
from bitmill.errors import BitmillError
from bitmill.report.text import describe_measurement

GB, GIB = 10**9, 2**30

PlannedModel = Annotated[
    str,
    typer.Argument(
        help="llama-7b, or any model; a config.json is enough, and of a hub id only this file is fetched.",
        autocompletion=complete_plannable,
        show_default=False,
    ),
]
Context = Annotated[
    str | None,
    typer.Option(
        metavar="N",
        help="Tokens per row; 128k is 128 * 1024, 1M 1024 * 1024. The trained context when left out.",
        show_default=False,
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory of each device: 80GB is 80 * 10^9 bytes, 80GiB 80 * 2^30.",
        show_default=False,
    ),
]
Gpus = Annotated[int, typer.Option(metavar="K", help="Devices that share weights and cache evenly.")]
Batch = Annotated[int, typer.Option(metavar="B", help="Rows (sequences) of that many tokens.")]
MethodName = Annotated[
    str | None,
    typer.Option(
        help="Method of the weights; without it and --bits they are as stored.",
        autocompletion=complete_method,
        show_default=False,
    ),
]
Bits = Annotated[
    int | None,
    typer.Option(
        metavar="B", help="Bits of the weights, by rtn without --method; 16 for floats.", show_default=False
    ),
]
KvMethod = Annotated[
    str | None,
    typer.Option(
        metavar="METHOD",
        help="Method of keys and values, NAME or NAME:key=value,...; fp16 when left out.",
        autocompletion=complete_kv,
        show_default=False,
    ),
]
KvBits = Annotated[int | None, typer.Option(metavar="B", help="Bits of keys and values.", show_default=False)]


def plan(
    model: PlannedModel,
    context: Context = None,
    memory: Memory = None,
    gpus: Gpus = 1,
    batch: Batch = 1,
    method: MethodName = None,
    bits: Bits = None,
    settings: MethodSettings = None,
    head_bits: HeadBits = None,
    kv: KvMethod = None,
    kv_bits: KvBits = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Compute the bytes of weights, cache and activations, and the longest context, from the config alone."""
    with command_output(as_json) as output:
        output.progress.start("starting", 0)
        from bitmill.workflows.plan.plan import plan
        from bitmill.workflows.plan.weights import WeightStorage

        result = plan(
            model,
            context=None if context is None else parse_tokens(context),
            memory=None if memory is None else parse_bytes(memory),
            devices=gpus,
            batch=batch,
            weights=WeightStorage(
                method, bits, parse_method_options(None, None, settings), parse_head_bits(head_bits)
            ),
            kv=kv,
            kv_bits=kv_bits,
            trust_remote_code=trust_remote_code,
        )
        output.result(result, lambda: _render(result))
        if result["fits"] is False:
            raise BitmillError(
                f"The model needs {_gb_and_gib(result['needed_bytes'])} on each device, which does not fit "
                f"{_memory(result)}; lower --context, --bits or --kv-bits, or give more --gpus."
            )


def _render(result: dict[str, Any]) -> list[Any]:
    parts = [
        property_table(_model_rows(result)),
        "",
        f"Keys and values at {result['context']:,} tokens",
        _cache_table(result),
        "",
        "Weights",
        _weight_table(result),
        *([property_table([("note", result["note"])])] if result["note"] else []),
        "",
    ]
    if result["memory_bytes"] is not None:
        parts += [f"Longest context, in tokens, {_memory(result)}", _longest_table(result), ""]
    return [*parts, property_table(total_rows(result))]


def _model_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    layers, trained = result["layers"], result["trained_context"]
    shapes = sorted({(layer["heads"], layer["dim"]) for layer in layers})
    windows = sorted({layer["window"] for layer in layers if layer["window"]})
    windowed = sum(1 for layer in layers if layer["window"])
    batch = f" x {result['batch']} rows" if result["batch"] > 1 else ""
    rows = [
        ("model", result["model"]),
        ("cached", f"{len(layers)} layers of {' or '.join(f'{h} heads of {d} numbers' for h, d in shapes)}"),
    ]
    if windows:
        rows.append(("windows", f"{windowed} of them keep the last {', '.join(map(str, windows))} tokens"))
    rows.append(("context", f"{result['context']:,} tokens{batch}"))
    if trained and trained < result["context"]:
        rows.append(("", f"the model was trained for {trained:,} tokens; beyond, only the capacity is computed"))
    return rows


def total_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (name, value) rows of the totals and the measured quality, from the result of `plan`."""
    weight, cache = (next(row for row in result[key] if row["chosen"]) for key in ("weights", "cache"))
    activations = result["activations"]
    rows = [
        ("weights", f"{_gb_and_gib(weight['size_bytes'])}, {weight['name']}"),
        ("keys and values", f"{_gb_and_gib(cache['size_bytes'])}, {_cache_name(cache)}, {cache['bits']} bits"),
        ("activations", f"{_gb_and_gib(activations['prompt_bytes'])} on every device"),
        ("on each device", f"{_gb_and_gib(result['needed_bytes'])}, with weights and cache shared evenly"),
    ]
    if result["fits"] is not None:
        spare = result["memory_bytes"] - result["needed_bytes"]
        fit = (
            f"fits, {_gb_and_gib(spare)} to spare"
            if result["fits"]
            else f"does not fit, {_gb_and_gib(-spare)} too much"
        )
        rows.append(("capacity", f"{fit} {_memory(result)}"))
    measured = [f"{describe_measurement(m)}; weights as stored, {_kv_bits(m)}" for m in result["measured"]]
    rows += [("quality", text) for text in measured or ["not measured"]]
    return [*rows, ("computed", "everything but quality"), *_assumption_rows(activations)]


def _kv_bits(measured: dict[str, Any]) -> str:
    bits = measured.get("kv_bits_per_element")
    return "keys and values in float" if bits is None else f"keys and values at {bits:.2f} bits"


def _assumption_rows(activations: dict[str, Any]) -> list[tuple[str, str]]:
    at_once = _gb_and_gib(activations["prompt_at_once_bytes"])
    float_layer = _gb_and_gib(activations["float_layer_bytes"])
    return [
        (
            "assumed",
            f"prompts read {activations['chunk']} tokens at a time, attention straight from the packed cache;",
        ),
        ("", f"a prompt read at once: {at_once} of activations,"),
        ("", f"one layer in fp32, as reading a prompt in parts takes: {float_layer}"),
    ]


def _memory(result: dict[str, Any]) -> str:
    memory, devices = result["memory_bytes"], result["devices"]
    return f"in {_gb_and_gib(memory)} of memory" + (f" on each of {devices} devices" if devices > 1 else "")


def _gb_and_gib(size: int) -> str:
    return f"{_short(size / GB)} GB ({_short(size / GIB)} GiB)"


def _short(size: float) -> str:
    return f"{size:,.2f}" if size >= 1 else f"{size:.3g}"


def _cache_name(cache: dict[str, Any]) -> str:
    options = ",".join(f"{key}={value}" for key, value in cache["options"].items())
    return cache["method"] + (f":{options}" if options else "")


def _mark(row: dict[str, Any]) -> str:
    return "<" if row["chosen"] else ""


def _cache_table(result: dict[str, Any]) -> Any:
    rows = []
    for row in result["cache"]:
        size = row["size_bytes"]
        shares = [f"{row['parts'][part] / size:.1%}" for part in ("codes", "scales", "outliers", "floats")]
        sizes = [_short(size / GB), _short(size / GIB)]
        bits = [str(row["bits"]), f"{row['bits_per_element']:.3f}"]
        rows.append([_cache_name(row), *bits, *sizes, *shares, _mark(row)])
    columns = ("method", "bits", "bits/el.", "GB", "GiB", "codes", "scales", "outliers", "floats", "")
    return data_table(columns, rows, left=("method",))


def _weight_table(result: dict[str, Any]) -> Any:
    rows = []
    for row in result["weights"]:
        sizes = [_short(row["size_bytes"] / GB), _short(row["size_bytes"] / GIB)]
        rows.append([row["name"], f"{row['bits_per_weight']:.3f}", *sizes, _mark(row)])
    return data_table(("stored", "bits/w", "GB", "GiB", ""), rows, left=("stored",))


def _longest_table(result: dict[str, Any]) -> Any:
    names = [row["name"] for row in result["weights"]]
    tokens = {(row["weights"], row["method"], row["bits"]): row["tokens"] for row in result["longest"]}
    rows = []
    for cache in result["cache"]:
        lengths = [tokens[name, cache["method"], cache["bits"]] for name in names]
        shown = ["any" if n is None else f"{n:,}" if n else "-" for n in lengths]
        rows.append([_cache_name(cache), str(cache["bits"]), *shown])
    return data_table(("method", "bits", *names), rows, left=("method",))
