"""Turn the results of `bitmill compare` into docs/leaderboard.md and the table that picks the default method.

    bitmill compare smollm2-135m --methods ... --bits 2,3,4 -o board
    python benchmarks/leaderboard.py board/results.json [others/results.json ...]

Runs on the same terms share their tables. The default is picked from those of the first file; runs on other terms
follow in the page. Nothing is measured here: every figure is taken from results.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from quality import SUITE, leaders, read_all

from bitmill.errors import RecipeError
from bitmill.recipes.method import METHODS, build_recipe
from bitmill.report.results import Results, Variant, read_results

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "leaderboard.md"
DATA = ROOT / "src" / "bitmill" / "recipes" / "leaderboard.json"
HEAD = ("method", "bpw", "perplexity", "KL", "top-1", "quantized in", "peak memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    boards = merged([read_results(path) for path in parser.parse_args().results])
    PAGE.write_text(page(boards), encoding="utf-8")
    DATA.write_text(data(boards[0]), encoding="utf-8")
    print(f"{sum(len(board.done()) for board in boards)} variants written to {PAGE}, the first's to {DATA}")


def merged(runs: list[Results]) -> list[Results]:
    """Merge runs with equal settings; of a variant measured twice, the first result counts."""
    boards: list[Results] = []
    for run in runs:
        same = next(
            (k for k, b in enumerate(boards) if (b.settings, b.machine) == (run.settings, run.machine)), None
        )
        if same is None:
            boards.append(run)
            continue
        board = boards[same]
        names = {v.name for v in board.done()}
        variants = [v for v in board.variants if v.status == "done" or v.name not in {w.name for w in run.done()}]
        variants += [v for v in run.variants if v.name not in names]
        boards[same] = board.model_copy(
            update={"variants": variants, "commands": [*board.commands, *run.commands]}
        )
    return boards


def page(boards: list[Results]) -> str:
    """Return docs/leaderboard.md."""
    lines = [
        "# Leaderboard",
        "",
        "The linear layers of the blocks are quantized and everything they store is counted (bpw). KL is the "
        "divergence of the next-token distribution from the float model's, in nats a token; top-1 how often both "
        "put the same token first. Rows of one table share calibration text, held-out windows and machine; rows "
        "of different tables are not to be compared.",
        "",
        "## Five domains, other programs among them",
        "",
        "Calibrated on windows of `mix`, measured on the [suite](texts.md) of held-out text; every domain, other "
        "texts and intervals are in [Quality](quality.md).",
        "",
        SUITE[0] + leaders(read_all("suite")) + SUITE[1],
        "",
        "## Documentation alone",
        "",
        f"Methods on {boards[0].settings.model}, calibrated and measured on Python's documentation. The default "
        "method is picked from the first of these tables.",
        "",
    ]
    for board in boards:
        lines += _board(board)
    commands = [command for board in boards for command in board.commands]
    lines += ["## What is missing", "", *_missing(boards), ""]
    lines += [
        "## How it was made",
        "",
        "The recipe files are in `benchmarks/recipes`.",
        "",
        "```sh",
        *commands,
        f"python benchmarks/leaderboard.py {' '.join(folders(commands))}",
        "```",
        "",
    ]
    return "\n".join(lines)


def folders(commands: list[str]) -> list[str]:
    """Return the folders of results that the commands write, each once."""
    found = [words[words.index("-o") + 1] for command in commands if "-o" in (words := command.split())]
    return [f"{folder}/results.json" for folder in dict.fromkeys(found)]


def _board(results: Results) -> list[str]:
    """Return the section of one run of `bitmill compare`."""
    settings, machine, base = results.settings, results.machine, results.float
    assert base is not None
    calibration, evaluation = settings.calibration, settings.evaluation
    lines = [
        f"### Calibrated on {calibration.windows} x {calibration.seqlen} tokens",
        "",
        f"Calibration windows from {calibration.source} (seed {calibration.seed}), measured on "
        f"{evaluation.windows} held-out windows of {evaluation.seqlen} tokens; the float model has perplexity "
        f"{base.perplexity:.3f} on them. {_propagation(settings.propagate)} Times are wall seconds on "
        f"{machine.cpu}, {machine.cores} cores, {machine.threads} threads, no GPU, with other work on the "
        "machine; memory is the peak of the process.",
        "",
    ]
    for bits in sorted({v.bits for v in results.done() if v.bits}, reverse=True):
        found = [v for v in results.done() if v.bits == bits]
        lines += [f"#### {bits} bits, {calibration.windows} windows", ""]
        lines += [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
        lines += [_row(v) for v in sorted(found, key=lambda v: v.kl_divergence or 0.0)]
        lines.append("")
    absent = [v for v in results.variants if v.status != "done"]
    if absent:
        lines += ["Not in the tables:", "", *(f"- {v.name}: {v.reason or 'not run'}" for v in absent), ""]
    return lines


def _missing(boards: list[Results]) -> list[str]:
    """Return lines with the methods that no table has at bits that they support."""
    found = {(v.method, v.bits) for board in boards for v in board.done()}
    lines = []
    for bits in (4, 3, 2):
        names = [name for name in METHODS.names() if (name, bits) not in found and _exists(name, bits)]
        lines += [f"- {bits} bits: {', '.join(f'`{name}`' for name in names)}"] if names else []
    return lines or ["Nothing."]


def _exists(method: str, bits: int) -> bool:
    try:
        return build_recipe(method, {"bits": bits}).weight.rate == bits
    except RecipeError:
        return False


def data(results: Results) -> str:
    """Return recipes/leaderboard.json, which `bitmill.recipes.defaults` reads."""
    rows = [
        {
            "method": v.method,
            "bits": v.bits,
            "bits_per_weight": round(v.bits_per_weight or 0.0, 4),
            "perplexity": round(v.perplexity or 0.0, 4),
            "kl_divergence": round(v.kl_divergence or 0.0, 5),
            "minutes": round((v.quantize_time_s or 0.0) / 60, 2),
        }
        for v in results.done()
        if v.bits and _is_default(v)
    ]
    return json.dumps({"model": results.settings.model, "rows": rows}, indent=1) + "\n"


def _is_default(v: Variant) -> bool:
    """Return True if a variant is a named method with default options, not a recipe file of that name."""
    if v.method not in METHODS.names():
        return False
    has_bits = "bits" in METHODS.get(v.method).__dataclass_fields__
    return _agrees(v.recipe, build_recipe(v.method, {"bits": v.bits} if has_bits else {}).to_dict())


def _agrees(measured: Any, today: Any) -> bool:
    """Return True if recipes are equal except for options that did not exist at the time of measurement."""
    if isinstance(measured, dict):
        return isinstance(today, dict) and all(_agrees(value, today.get(key)) for key, value in measured.items())
    if isinstance(measured, list | tuple):
        return len(measured) == len(today) and all(map(_agrees, measured, today))
    return bool(measured == today)


def _row(v: Variant) -> str:
    assert v.bits_per_weight is not None
    assert v.perplexity is not None
    assert v.peak_memory_bytes is not None
    assert v.quantize_time_s is not None
    cells = (
        f"`{v.method}`",
        f"{v.bits_per_weight:.3f}",
        f"{v.perplexity:.2f}" if v.perplexity < 1000 else f"{v.perplexity:.3g}",
        f"{v.kl_divergence:.3f}",
        f"{v.top1_agreement:.1%}",
        f"{v.quantize_time_s:.0f} s",
        f"{v.peak_memory_bytes / 1e9:.2f} GB",
    )
    return f"| {' | '.join(cells)} |"


def _propagation(propagate: str) -> str:
    if propagate == "float":
        return (
            "Every block was calibrated on the float model's hidden states (`--propagate float`), so that one "
            "pass serves all rows: the first method that needs statistics is charged for collecting them. The "
            "default calibrates each block on the quantized blocks before it, which gives other figures."
        )
    return "Every block was calibrated on the outputs of the quantized blocks before it."


if __name__ == "__main__":
    main()
