"""Sentences about a quantized folder, from its report: formats, sizes of its parts, packed keys and values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from bitmill.report import formatting

Report = dict[str, Any]

FP16_BITS = 16  # more than a cache without packing has


def describe_format(format: dict[str, Any]) -> str:
    """Return a format, as `Format.to_dict` gives it, as text: `uniform (bits 3, group_size 64)`.

    Wrappers come before the format they wrap: `rotated (seed 0) around uniform (bits 3)`.
    """
    inner = format.get("inner")
    options = ", ".join(
        f"{key} {describe_format(value) if isinstance(value, dict) else value}"
        for key, value in format.items()
        if key not in ("format", "inner")
    )
    name = f"{format['format']} ({options})" if options else str(format["format"])
    return f"{name} around {describe_format(inner)}" if isinstance(inner, dict) else name


def describe_simulation(format: dict[str, Any] | None) -> str:
    """Return how simulated inputs are computed, from a format or the `inputs` of a recipe; empty for others."""
    while format:
        if format.get("simulated"):
            return (
                "simulated: rounded, and multiplied in floats where no kernel multiplies them as they are stored"
            )
        format = format.get("inner")
    return ""


def describe_inputs(inputs: dict[str, Any]) -> str:
    """Return the format of a recipe's inputs: `uniform (bits 8, group_size row)`."""
    simulation = describe_simulation(inputs)
    plain = describe_format({key: value for key, value in inputs.items() if key != "simulated"})
    return f"{plain}, {simulation}" if simulation else plain


def describe_attention(attention: dict[str, Any]) -> str:
    """Return the formats of what attention multiplies: `keys in uniform (bits 8, group_size row), rounded ...`."""
    plain = {site: {k: v for k, v in format.items() if k != "parameters"} for site, format in attention.items()}
    sites = [f"{site} in {describe_format(format)}" for site, format in plain.items()]
    return (
        f"{', '.join(sites)}: as integers where the numbers of every sum share a scale, on a CPU, and otherwise "
        "simulated: rounded, and multiplied in floats"
    )


def describe_exceptions(recipe: dict[str, Any], code: Callable[[str], str] = str) -> str:
    """Return the rules of a recipe as one sentence; empty without rules.

    Args:
        recipe: the recipe as plain data.
        code: marks up the patterns of layer names.
    """
    rules = [(pattern, "float") for pattern in recipe.get("ignore", [])]
    for rule in recipe.get("rules", []):
        weight = rule.get("weight")
        changed = [weight if isinstance(weight, str) else describe_format(weight)] if weight is not None else []
        changed += [f"solver {rule['solver']['solver']}"] if rule.get("solver") else []
        inputs = rule.get("inputs")
        changed += [f"inputs {inputs if isinstance(inputs, str) else describe_inputs(inputs)}"] if inputs else []
        changed += ["other transforms"] if rule.get("transforms") is not None else []
        rules.append((rule["sites"], ", ".join(changed)))
    if not rules:
        return ""
    return (
        "Exceptions, first match wins: " + "; ".join(f"{code(sites)} {changed}" for sites, changed in rules) + "."
    )


def describe_options(options: dict[str, Any]) -> str:
    """Return options as text, values as written on the command line: `bits 3, sink 2`."""
    return ", ".join(f"{key} {_option_value(value)}" for key, value in options.items())


def describe_kv_cache(kv: dict[str, Any]) -> str:
    """Return one sentence about the packed cache, from the `kv` of a report."""
    options = dict(kv["method"])
    method = options.pop("kv method")
    calibration, calibrated = kv.get("calibration"), ""
    if calibration:
        windows = f"{calibration['samples']} windows of {calibration['seqlen']} tokens"
        calibrated = f", calibrated on {windows} of {calibration['source']} ({kv['size_bytes']:,} bytes)"
    return (
        f"Keys and values are packed by {method} ({describe_options(options)}) when text is generated: "
        f"{kv['bits_per_element']:.3f} bits per number in full pages{calibrated}."
    )


def describe_training(trained: dict[str, Any]) -> str:
    """Return one sentence about an end-to-end training, from the `trained` of a report."""
    learned = {"all": "scales, codebooks, norms and biases", "scales": "scales and codebooks"}
    kl = trained["loss"] == "kl"
    to = f"the predictions of {trained['teacher']}" if kl else "the text"
    windows = f"{trained['windows']['trained_on']} windows of {trained['windows']['source']}"
    key, name = ("kl_divergence", "KL divergence") if kl else ("perplexity", "perplexity")
    before, after = (formatting.number(trained[when][key]) for when in ("before", "after"))
    earlier = f"{describe_training(trained['earlier'])} Then " if "earlier" in trained else ""
    what = learned.get(trained["learn"], "norms and biases")
    return earlier + (
        f"{what if earlier else what.capitalize()} were trained end to end to {to} on "
        f"{windows}, {formatting.plural(trained['epochs'], 'epoch')}: {name} {before} before and {after} after, "
        f"on {formatting.plural(trained['held_apart'], 'window')} that were not trained on."
    )


def describe_measured_cache(measured: dict[str, Any]) -> str:
    """Return the packed cache that a measurement used, as text; empty for an ordinary cache."""
    if measured.get("kv_method") is None:
        return ""
    bits = describe_cache_bits(measured["kv_bits_per_element"], " of the cache")
    return f" through {measured['kv_method']}, {bits}"


def unit_of(entry: dict[str, Any]) -> str:
    """Return the windows of a measurement or a calibration, such as pictures; "" for rows of tokens."""
    return str(entry.get("unit", ""))


def describe_amount(measured: dict[str, Any]) -> str:
    """Return how much a measurement read, in pictures and the like or in windows of tokens."""
    if unit := unit_of(measured):
        return f"{measured.get('windows')} {unit}"
    return f"{measured.get('windows')} x {measured.get('seqlen')} tokens"


def describe_windows(measured: dict[str, Any]) -> str:
    """Return the text of a measurement, its number of windows, and the command that made it."""
    windows = f"{measured.get('windows')} windows of {measured.get('seqlen')} tokens"
    windows = describe_amount(measured) if unit_of(measured) else windows
    by = f", measured by bitmill {measured['by']}" if measured.get("by") else ""
    cache = describe_measured_cache(measured)
    return f"{windows} of {measured.get('text')}, {measured.get('split')} split{by}{cache}"


def describe_cache_bits(bits: float, of: str = "") -> str:
    """Return the bits per number of a packed cache as text, or why there is no such figure.

    Args:
        bits: allocated bits over the numbers of keys and values.
        of: follows the figure.
    """
    if bits > FP16_BITS:
        return "mostly the page in fp16 that is allocated at once"
    return f"{bits:.3f} bits per number{of}"


def describe_running(running: dict[str, Any]) -> str:
    """Return one line about the packed model as it runs, from the `running` of a report."""
    inputs = f"inputs in {running['activations']}, {running['isa'] or running['device']} kernels"
    figures = [
        f"{name}: KL {formatting.number(running[path]['kl_divergence'], 3)} nats, "
        f"top-1 {formatting.percent(running[path]['top1_agreement'])}"
        for path, name in (("decode", "one token at a time"), ("windows", "whole windows"))
    ]
    return f"{'; '.join(figures)} ({running['tokens']} tokens, {inputs})".replace(formatting.GAP, " ")


def split_layers(report: Report) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the quantized layers of the blocks, and those outside of them: embedding and head."""
    ends = report.get("ends") or {}
    non_block = (ends.get("embedding"), ends.get("head"))
    layers = report["layers"]
    return [v for v in layers if v["name"] not in non_block], [v for v in layers if v["name"] in non_block]


def block_layer_bytes(report: Report) -> int:
    """Return the bytes of the quantized layers of the blocks, shared parameters included."""
    layers, _ = split_layers(report)
    if any("shared" in layer for layer in layers):  # shared bytes belong to no layer, only to the model's bits
        return round(report["bits_per_weight"] * sum(math.prod(layer["shape"]) for layer in layers) / 8)
    return sum(layer["size_bytes"] for layer in layers)


def part_sizes(report: Report) -> list[tuple[str, int]]:
    """Return (part, bytes of its tensors) for each part; empty for reports of versions without these sizes."""
    if report.get("unquantized_bytes") is None:
        return []
    non_block = sum(layer["size_bytes"] for layer in split_layers(report)[1])
    sizes = [
        ("in the blocks' linear layers", block_layer_bytes(report)),
        (f"in {_embedding_and_head(report)}", non_block),
    ]
    return [part for part in sizes if part[1]] + [("in float", report["unquantized_bytes"])]


def describe_embedding_and_head(report: Report) -> str:
    """Return one sentence about the storage of embedding and head."""
    ends = report.get("ends")
    if not ends:
        return "Embeddings, norms and the head are as in the source."
    parts = _embedding_and_head(report)
    bits = f"{report['head_bits_per_weight']:.3f} bits per weight"
    tied = ", one matrix for both" if ends["tied"] else ""
    formats = report.get("head_formats") or {"": report["recipe"]["head"]}
    format = " and ".join(dict.fromkeys(describe_format(format) for format in formats.values()))
    verb = "are" if ends["embedding"] else "is"
    return (
        f"{parts.capitalize()} {verb} stored packed too, in {format}, {bits}{tied}; "
        "all other tensors outside the blocks are as in the source."
    )


_SHOWN_SHARE = 0.001  # of the weights; norms have less


def describe_source_types(source_types: list[dict[str, Any]]) -> str:
    """Return the rest of a sentence about a source of quantized weights; "" where all of them were floats.

    Args:
        source_types: the entry of a report, with `type`, `bits_per_weight` and `share` of the weights.
    """
    if not source_types:
        return ""
    listed = ", ".join(
        f"{stored['share']:.1%} of its weights in {stored['type']} ({stored['bits_per_weight']:g} bits)"
        for stored in source_types
        if stored["share"] >= _SHOWN_SHARE
    )
    return f"is already quantized: it has {listed}. Its errors come on top of those measured here."


def describe_sizes(report: Report) -> str:
    """Return one sentence with the bytes of each part; empty where they are not recorded."""
    sizes = part_sizes(report)
    if not sizes:
        return ""
    listed = ", ".join(f"{formatting.size(size)} {name}" for name, size in sizes)
    total = formatting.size(sum(size for _, size in sizes))
    text = f"The tensors take {total}: {listed}."
    if report.get("size_ratio") is not None:
        share, original = formatting.percent(report["size_ratio"]), formatting.size(report["original_bytes"])
        text += f" That is {share} of the {original} of the original's."
    return text.replace(formatting.GAP, " ")


def _embedding_and_head(report: Report) -> str:
    ends = report.get("ends") or {}
    parts = {"token embeddings": ends.get("embedding"), "head": ends.get("head")}
    return " and ".join(name for name, path in parts.items() if path)


def _option_value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
