"""bitmill plan."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from bitmill.cli.options import AsJson, HeadBits, TrustRemoteCode
from bitmill.cli.output import facts, measured_row, working

GB, GIB = 10**9, 2**30


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="llama-7b, or any model; a config.json is enough, and all that is fetched of a hub id.",
            show_default=False,
        ),
    ],
    context: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Tokens of a row; 128k is 128 * 1024, 1M 1024 * 1024. As many as the model was trained for when "
            "left out.",
            show_default=False,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Of each device: 80GB is 80 * 10^9 bytes, 80GiB 80 * 2^30.", show_default=False
        ),
    ] = None,
    gpus: Annotated[int, typer.Option(metavar="K", help="Devices that share weights and cache evenly.")] = 1,
    batch: Annotated[int, typer.Option(metavar="B", help="Rows of that many tokens.")] = 1,
    method: Annotated[
        str | None,
        typer.Option(help="How the weights are stored; as they are without it and --bits.", show_default=False),
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(
            metavar="B", help="Of the weights; 16 for floats. Of rtn without --method.", show_default=False
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Option of the method; repeatable.", show_default=False),
    ] = None,
    head_bits: HeadBits = None,
    kv: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD",
            help="How keys and values are stored, NAME or NAME:key=value,...; fp16 when left out.",
            show_default=False,
        ),
    ] = None,
    kv_bits: Annotated[
        int | None, typer.Option(metavar="B", help="Of keys and values.", show_default=False)
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Say what fits: weights, keys and values, activations, and the longest context, from the config alone."""
    with working(as_json) as output:
        output.progress.start("starting", 0)
        from bitmill.cli.quantize import method_options
        from bitmill.workflows.plan import Wanted
        from bitmill.workflows.plan import plan as planned
        from bitmill.workflows.plan.units import parse_bytes, parse_tokens

        result = planned(
            model,
            context=None if context is None else parse_tokens(context),
            memory=None if memory is None else parse_bytes(memory),
            devices=gpus,
            batch=batch,
            weights=Wanted(method, bits, method_options(None, None, settings or []), head_bits),
            kv=kv,
            kv_bits=kv_bits,
            trust_remote_code=trust_remote_code,
        )
        output.result(result, lambda: _readable(result))


def _readable(result: dict[str, Any]) -> list[Any]:
    parts = [
        facts(_model(result)),
        "",
        f"Keys and values at {result['context']:,} tokens",
        _caches(result),
        "",
        "Weights",
        _weights(result),
        *([facts([("note", result["note"])])] if result["note"] else []),
        "",
    ]
    if result["memory_bytes"] is not None:
        parts += [f"Longest context, in tokens, {_where(result)}", _longest(result), ""]
    return [*parts, facts(_verdict(result))]


def _model(result: dict[str, Any]) -> list[tuple[str, str]]:
    layers, trained = result["layers"], result["trained_context"]
    shapes = sorted({(layer["heads"], layer["dim"]) for layer in layers})
    windows = sorted({layer["window"] for layer in layers if layer["window"]})
    some = sum(1 for layer in layers if layer["window"])
    rows = [
        ("model", result["model"]),
        ("cached", f"{len(layers)} layers of {' or '.join(f'{h} heads of {d} numbers' for h, d in shapes)}"),
        *([("windows", f"{some} of them keep the last {', '.join(map(str, windows))} tokens")] if windows else []),
        (
            "context",
            f"{result['context']:,} tokens" + (f" x {result['batch']} rows" if result["batch"] > 1 else ""),
        ),
    ]
    if trained and trained < result["context"]:
        rows.append(("", f"the model was trained for {trained:,}: beyond them this is capacity alone"))
    return rows


def _verdict(result: dict[str, Any]) -> list[tuple[str, str]]:
    weight, cache = (next(row for row in result[key] if row["chosen"]) for key in ("weights", "cache"))
    activations = result["activations"]
    rows = [
        ("weights", f"{_both(weight['size_bytes'])}, {weight['name']}"),
        ("keys and values", f"{_both(cache['size_bytes'])}, {_spelled(cache)}, {cache['bits']} bits"),
        ("activations", f"{_both(activations['prompt_bytes'])} on every device"),
        ("on each device", f"{_both(result['needed_bytes'])}, with weights and cache shared evenly"),
    ]
    if result["fits"] is not None:
        spare = result["memory_bytes"] - result["needed_bytes"]
        said = f"fits, {_both(spare)} to spare" if result["fits"] else f"does not fit, {_both(-spare)} too much"
        rows.append(("capacity", f"{said} {_where(result)}"))
    measured = [f"{measured_row(entry)}; weights as stored, {_keys(entry)}" for entry in result["measured"]]
    rows += [("quality", said) for said in measured or ["not measured"]]
    return [*rows, ("computed", "everything but quality"), *_assumed(result)]


def _keys(measured: dict[str, Any]) -> str:
    bits = measured.get("kv_bits_per_element")
    return "keys and values in float" if bits is None else f"keys and values at {bits:.2f} bits"


def _assumed(result: dict[str, Any]) -> list[tuple[str, str]]:
    activations = result["activations"]
    return [
        (
            "assumed",
            f"prompts read {activations['chunk']} tokens at a time, attention straight from the packed cache;",
        ),
        ("", f"a prompt read at once: {_both(activations['prompt_at_once_bytes'])} of activations,"),
        (
            "",
            f"one layer in fp32, as reading a prompt in parts takes: {_both(activations['float_layer_bytes'])}",
        ),
    ]


def _where(result: dict[str, Any]) -> str:
    memory, devices = result["memory_bytes"], result["devices"]
    return f"in {_both(memory)} of memory" + (f" on each of {devices} devices" if devices > 1 else "")


def _both(size: int) -> str:
    return f"{_short(size / GB)} GB ({_short(size / GIB)} GiB)"


def _short(size: float) -> str:
    return f"{size:,.2f}" if size >= 1 else f"{size:.3g}"


def _spelled(cache: dict[str, Any]) -> str:
    options = ",".join(f"{key}={value}" for key, value in cache["options"].items())
    return cache["method"] + (f":{options}" if options else "")


def _mark(row: dict[str, Any]) -> str:
    return "<" if row["chosen"] else ""


def _caches(result: dict[str, Any]) -> Any:
    table = _table("method", "bits", "bits/el.", "GB", "GiB", "codes", "scales", "outliers", "floats", "")
    for row in result["cache"]:
        shares = (row["parts"][part] for part in ("codes", "scales", "outliers", "floats"))
        table.add_row(
            _spelled(row), str(row["bits"]), f"{row['bits_per_element']:.3f}", _short(row["size_bytes"] / GB),
            _short(row["size_bytes"] / GIB), *(f"{share / row['size_bytes']:.1%}" for share in shares), _mark(row),
        )  # fmt: skip
    return table


def _weights(result: dict[str, Any]) -> Any:
    table = _table("stored", "bits/w", "GB", "GiB", "")
    for row in result["weights"]:
        size = row["size_bytes"]
        table.add_row(
            row["name"], f"{row['bits_per_weight']:.3f}", _short(size / GB), _short(size / GIB), _mark(row)
        )
    return table


def _longest(result: dict[str, Any]) -> Any:
    names = [row["name"] for row in result["weights"]]
    table = _table("method", "bits", *names)
    found = {(row["weights"], row["method"], row["bits"]): row["tokens"] for row in result["longest"]}
    for cache in result["cache"]:
        lengths = [found[name, cache["method"], cache["bits"]] for name in names]
        shown = ["any" if n is None else f"{n:,}" if n else "-" for n in lengths]
        table.add_row(_spelled(cache), str(cache["bits"]), *shown)
    return table


def _table(*columns: str) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    return table
