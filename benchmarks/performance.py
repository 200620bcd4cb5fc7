"""Turn results of the speed benchmarks into docs/performance.md and its picture.

    bitmill bench kernels --json > benchmarks/results/kernels.json
    python benchmarks/peers/run.py
    python benchmarks/performance.py

Nothing is measured here: every figure is taken from benchmarks/results.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from roofline import roofline

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
PICTURE = ROOT / "docs" / "assets" / "roofline.svg"
BUSY = 0.1  # share of the processors used by other work; above it figures are provisional
COMMANDS = (
    "bitmill bench kernels --json > benchmarks/results/kernels.json",
    "python benchmarks/peers/run.py --prepare",
    "python benchmarks/peers/run.py",
    "python benchmarks/performance.py",
)


def main() -> None:
    kernels, others, runs = results()
    if kernels:
        arithmetic = [run["machine"]["arithmetic"] for run in runs if run["machine"].get("arithmetic")]
        PICTURE.write_text(roofline(kernels, max(arithmetic, default=None)), encoding="utf-8")
    PAGE.write_text(page(kernels, others, runs), encoding="utf-8")
    print(f"{PAGE} made from {bool(kernels) + len(runs)} results")


def results() -> tuple[dict[str, Any] | None, list[dict[str, Any]], list[dict[str, Any]]]:
    """Read benchmarks/results: the kernels, the kernels on other machines, and every model."""
    others, models = (
        [_read(f) for f in sorted(RESULTS.glob(name))] for name in ("kernels-*.json", "peers-*.json")
    )
    return _read(RESULTS / "kernels.json"), list(filter(None, others)), list(filter(None, models))


def page(kernels: dict[str, Any] | None, others: list[dict[str, Any]], runs: list[dict[str, Any]]) -> str:
    """Return docs/performance.md.

    Args:
        kernels: Result of `bitmill bench kernels`, if there is one.
        others: Its results on other machines.
        runs: Results of peers/run.py.
    """
    lines = [
        "# Performance",
        "",
        "Speed of quantized weights: single matrix-vector products relative to memory bandwidth, and whole "
        "models next to other programs on the same machine. Figures are medians over turns; within a turn "
        "everything that is compared was measured one after the other, so ratios are more reliable than "
        "absolute figures.",
        "",
    ]
    if runs:
        lines += _machine(runs)
    if kernels:
        lines += _kernels(kernels)
    for other in others:
        lines += _other_machine(other)
    if runs:
        lines += ["## Whole models", "", *_how_models_were_measured(runs[0])]
    for run in sorted(runs, key=lambda run: run["model"]):
        lines += _model(run)
    lines += [
        "## Reproduction",
        "",
        "```sh",
        *COMMANDS,
        "```",
        "",
        "`--prepare` creates an environment for every peer and the models in all formats, once; the other "
        "commands take minutes. `--threads N` limits all engines; `--model`, `--peers` and `--turns` shorten a "
        "run; `--peers llama.cpp,torch,vllm` adds vLLM.",
        "",
    ]
    return "\n".join(lines)


def _machine(runs: list[dict[str, Any]]) -> list[str]:
    machine = runs[0]["machine"]
    read = median(b for run in runs for b in run["read_bandwidths"])
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    rows = [
        ("processor", f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}"),
        ("instruction sets", ", ".join(machine["instruction_sets"])),
        ("largest cache", f"{machine['cache_bytes'] / 2**20:.0f} MB"),
        ("memory", f"{machine['memory_bytes'] / 1e9:.0f} GB"),
        ("threads", str(machine["threads"])),
        ("read bandwidth", f"{read / 1e9:.1f} GB/s"),
        (
            "fp32 arithmetic",
            f"{machine['arithmetic'] / 1e9:.0f} billion operations a second, torch's matrix product",
        ),
        ("versions", versions),
        ("measured", machine["date"]),
    ]
    lines = ["## Machine", "", "| | |", "|---|---|", *(f"| {' | '.join(row)} |" for row in rows), ""]
    busy = max(run["machine"]["busy"] for run in runs)
    if busy > BUSY:
        lines += [f"Other work took {busy:.0%} of the processors meanwhile: these figures are provisional.", ""]
    return lines


def _kernels(kernels: dict[str, Any]) -> list[str]:
    return [
        "## Matrix-vector products",
        "",
        "![Roofline of the kernels](assets/roofline.svg)",
        "",
        f"One token, {kernels['threads']} threads, {kernels['isa'] or 'reference'} kernels, "
        f"{kernels['activations']} activations. Weights are cold: copies alternate until more than the caches "
        "hold has been read. GB/s counts packed bytes; reading alone reaches "
        f"{kernels['read_bandwidth_GBps']:.1f} GB/s. The last column of a shape is the speedup over torch's fp32 "
        "`F.linear`. The `points` kernel reads more than it counts: it repacks pyramids as integers of one "
        "bit more, 1.3 to 1.6 times the packed size.",
        "",
        *_table(kernels["kernels"]),
    ]


def _other_machine(kernels: dict[str, Any]) -> list[str]:
    return [
        f"### With {kernels['isa']}",
        "",
        "On another machine, which has no better instruction set and is shared, so that figures vary: "
        f"{kernels['threads']} threads, {kernels['read_bandwidth_GBps']:.1f} GB/s.",
        "",
        *_table(kernels["kernels"]),
    ]


def _table(cases: list[dict[str, Any]]) -> list[str]:
    shapes = sorted({tuple(case["shape"]) for case in cases})
    head = ["format", "bits", "group", "bits a weight", "kernel"]
    for out, inputs in shapes:
        head += [f"{out} x {inputs}", "GB/s", "of bandwidth", "over torch fp32"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    rows: dict[tuple[Any, ...], dict[tuple[int, ...], dict[str, Any]]] = {}
    for case in cases:
        key = (case["format"], case["bits"], case["group_size"], case["kernel"])
        rows.setdefault(key, {})[tuple(case["shape"])] = case
    for (format, bits, group, kernel), found in rows.items():
        weight = max(case["bits_per_weight"] for case in found.values())
        cells = [f"`{format}`", f"{bits:g}", str(group or ""), f"{weight:.2f}", f"`{kernel}`"]
        for shape in shapes:
            cells += _case(found.get(shape))
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *_evenness(cases), ""]


def _case(case: dict[str, Any] | None) -> list[str]:
    if case is None:
        return [""] * 4
    share, speedup = case["fraction_of_read_bandwidth"], case["speedup_vs_torch_fp32"]
    return [f"{1e3 * case['time_s']:.3f} ms", f"{case['GBps']:.1f}", f"{share:.0%}", f"{speedup:.1f}x"]


def _evenness(cases: list[dict[str, Any]]) -> list[str]:
    """Return the speed of other formats relative to the uniform one at equal bits, in GB/s of packed bytes."""
    speeds: dict[str, list[float]] = {}
    uniform = {(c["bits"], *c["shape"]): c["GBps"] for c in cases if c["format"] == "uniform"}
    for case in cases:
        key = (case["bits"], *case["shape"])
        if case["format"] in ("codebook", "binary_coding") and key in uniform and case["bits"] in (2, 3, 4):
            speeds.setdefault(case["format"], []).append(case["GBps"] / uniform[key])
    ranges = [f"`{name}` {min(found):.2f} to {max(found):.2f}" for name, found in speeds.items()]
    return [f"At 2, 3 and 4 bits, GB/s relative to `uniform`: {', '.join(ranges)}."] if ranges else []


def _how_models_were_measured(run: dict[str, Any]) -> list[str]:
    return [
        "Every engine is a process; they alternate, bitmill between its peers. Decode is the median time of "
        f"{run['decode_tokens']} greedy tokens after a prompt of {run['prompt_tokens']}, prefill the time to the "
        f"logits after {run['prefill_tokens']} tokens. llama.cpp is compiled for this machine and called through "
        "its C interface, with the threads, flash attention and batch that were fastest for that file in this "
        "run. Size is that of the weights on disk; memory is the peak of the process, which for llama.cpp "
        "includes the mapped file in addition to repacked weights. An engine is measured only if its logits are "
        "close to the fp32 model's (cosine) and this model assigns its continuation a high likelihood (nats per "
        "token).",
        "",
    ]


def _model(run: dict[str, Any]) -> list[str]:
    head = ("engine", "size", "decode, tokens/s", "prefill, tokens/s", "peak memory", "cosine", "nats")
    lines = [f"### {run['model']}", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for engine in _ours_first(run):
        check = engine["check"]
        cells = [
            _named(engine),
            f"{engine['size_bytes'] / 1e6:.0f} MB",
            _speed(engine["decode"]),
            _speed(engine["prefill"]),
            f"{engine['peak_memory_bytes'] / 1e6:.0f} MB",
            "" if check["cosine"] is None else f"{check['cosine']:.3f}",
            "" if check.get("text") in (None, "") else f"{check['nats']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    ours = sorted({pair["bits"] for pair in run["ratios"]}, reverse=True)
    head = ("bitmill's speed over", *(f"{what}, {bits} bits" for what in ("decode", "prefill") for bits in ours))
    lines += ["", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for peer in dict.fromkeys(pair["peer"] for pair in run["ratios"]):
        found = {pair["bits"]: pair for pair in run["ratios"] if pair["peer"] == peer}
        cells = [peer] + [_ratio(found[bits][what]) for what in ("decode", "prefill") for bits in ours]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *_notes(run)]
    texts = [e for e in _ours_first(run) if e["check"].get("text")]
    if texts:
        lines += [
            "Continuations:",
            "",
            "```text",
            *(f"{e['name']:16s} {e['check']['text']}" for e in texts),
            "```",
            "",
        ]
    return lines


def _ours_first(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the engines of bitmill, then those of each peer."""
    order = ["bitmill", *dict.fromkeys(engine["peer"] for engine in reversed(run["engines"]))]
    return sorted(run["engines"], key=lambda engine: order.index(engine["peer"]))


def _notes(run: dict[str, Any]) -> list[str]:
    notes = [run["about"]] if run.get("about") else []
    turns = [max(len(engine[what]["seconds"]) for engine in run["engines"]) for what in ("decode", "prefill")]
    notes.append(f"Medians over {turns[0]} turns of decoding and {turns[1]} of reading the prompt.")
    for engine in _ours_first(run):
        uses = engine["settings"].get("decode")
        if engine["peer"] == "llama.cpp" and uses:
            batch = engine["settings"]["prefill"]
            notes.append(
                f"{engine['name']}: matrices in {engine['made']}; decode with {uses['threads']} threads, "
                f"flash attention {_switch(uses)}; prefill by {batch['ubatch']} tokens, flash attention "
                f"{_switch(batch)}."
            )
        if engine["peer"] == "vllm":
            notes.append(
                f"{engine['name']}: version {engine['settings']['version']}, added by "
                "`--peers llama.cpp,torch,vllm`; it runs whole requests: decode is the difference of those of 33 "
                "tokens and of 1; its logits are not accessible; memory includes 1 GB for keys and values."
            )
        if engine["peer"] == "bitmill":
            notes.append(
                f"{engine['name']}: `{engine['made']}`; decode path: {engine['settings']['decode']}.".replace(
                    "..", "."
                )
            )
    return [*(f"- {note}" for note in notes), ""]


def _switch(uses: dict[str, int]) -> str:
    return "on" if uses["flash_attention"] else "off"


def _named(engine: dict[str, Any]) -> str:
    return f"**{engine['name']} bits**" if engine["peer"] == "bitmill" else engine["name"]


def _speed(measured: dict[str, Any] | None) -> str:
    return f"{measured['tokens_per_s']:.1f}" if measured else "failed its check"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


if __name__ == "__main__":
    main()
