"""Turn the results of benchmarks/suite.py into docs/quality.md and tables of the README and the leaderboard.

    python benchmarks/quality.py

Nothing is measured here: every figure is taken from results/suite-MODEL.json.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PAGE, README = ROOT / "docs" / "quality.md", ROOT / "README.md"
LEADERBOARD = ROOT / "docs" / "leaderboard.md"
SUITE = ("<!-- suite:begin -->\n", "\n<!-- suite:end -->")  # the part of the leaderboard that is written here
PEER_WINDOWS = 128  # of benchmarks/peers/float_files.py
MODELS = {  # largest last
    "smollm2-135m": "SmolLM2-135M-Instruct, whose source has 4 bits a weight (Q4_1)",
    "gemma3-270m": "Gemma-3-270M, a base model, whose source has 4 to 8 bits a weight (Q4_K_M)",
    "qwen2.5-coder-0.5b": "Qwen2.5-Coder-0.5B-Instruct, whose source was made from 4-bit weights",
}
DOMAINS = ("documentation", "prose", "encyclopedia", "dialogue", "code")
BESIDE = {"brown": "Brown", "german": "German", "wikitext-2": "WikiText-2"}
BITS, TOP = 3, 4  # rows in the README
LEADERS = ("method", "windows", "bpw", "KL", "worst domain", "perplexity over float", "top-1")
INPUTS = (
    "Layers multiply inputs that are rounded, which bpw does not count. Behind the name: -gN a scale for N "
    "columns of a token; -tN the threshold of `llm_int8`; for `quik` the columns in float, -downN "
    "the bits of the second MLP layer (8 without it), -rotated by a Hadamard matrix. rtn-8bit, gptq-4bit and fp8 "
    "are weights of the others, with float inputs. "
)


def main() -> None:
    documents = read_all("suite")
    PAGE.write_text(page(documents, read_all("long"), read_all("activations")), encoding="utf-8")
    README.write_text(with_table(README.read_text(encoding="utf-8"), documents), encoding="utf-8")
    board = LEADERBOARD.read_text(encoding="utf-8")
    LEADERBOARD.write_text(between(board, SUITE, leaders(documents)), encoding="utf-8")


def read_all(kind: str) -> dict[str, dict[str, Any]]:
    """Return the results of a kind by model."""
    files = {name: RESULTS / f"{kind}-{name}.json" for name in MODELS}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.exists()}


def page(
    documents: dict[str, dict[str, Any]], long: dict[str, dict[str, Any]], activations: dict[str, dict[str, Any]]
) -> str:
    """Return docs/quality.md.

    Args:
        documents: weights of few bits, by model.
        long: the same on windows of many tokens.
        activations: rounded inputs of layers, by model.
    """
    lines = [
        "# Quality",
        "",
        "KL is the divergence of the next-token distribution from the float model's, in nats a token: its mean "
        "over the [suite](texts.md), five domains of held-out text, with the 95 % interval of that mean; then on "
        "each domain and on texts that are in no mixture: Brown, German, a language that calibration has none of, "
        "and WikiText-2 (tokenized, with its <unk>, as pytorch/examples has it). `ratio` is the perplexity over "
        "the float model's on the suite, top-1 how often both put the same token first. bpw counts everything "
        "that the linear layers of the blocks store. `windows` is the number of calibration windows, 512 tokens "
        "of `mix` each, the same tokens for bitmill and for other programs; - where a method reads no text. Rows "
        "that are trained went through `bitmill train` on these windows.",
        "",
    ]
    sections = list(documents.items())
    sections += [(f"{model}, {one['seqlen']:,} tokens a window", one) for model, one in long.items()]
    for title, document in sections:
        rows = sorted(document["rows"], key=lambda row: (-bits_of(row), mean_of(row)))
        lines += _section(title, document, [(f"{method_of(row)}, {bits_of(row)} bits", row) for row in rows])
    for model, document in activations.items():
        rows = sorted(document["rows"], key=mean_of)
        lines += _section(f"{model}, rounded inputs", document, [(row["name"], row) for row in rows], INPUTS)
    return "\n".join(lines)


def _section(
    title: str, document: dict[str, Any], rows: list[tuple[str, dict[str, Any]]], about: str = ""
) -> list[str]:
    """Return a section with a table of (label, row), best first."""
    texts = document["texts"]
    windows = texts["suite"]["windows"]
    count = next(iter(windows.values()))
    model = MODELS[document["model"]]
    beside = ", ".join(f"{BESIDE[name]} {texts[name]['windows']}" for name in BESIDE if name in texts)
    head = [
        "method",
        "windows",
        "bpw",
        "KL",
        *DOMAINS,
        *(BESIDE[n] for n in BESIDE if n in texts),
        "ratio",
        "top-1",
    ]
    lines = [
        f"## {title}",
        "",
        f"{about}{model}. {count} windows of {document['seqlen']} tokens of each domain; {beside}.",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
    ]
    return [*lines, *(_row(label, row, texts) for label, row in rows), ""]


def _row(label: str, row: dict[str, Any], texts: dict[str, Any]) -> str:
    suite = row["figures"]["suite"]
    low, high = suite["kl_interval"]
    cells = [
        label,
        windows_of(row),
        f"{row['bits_per_weight']:.3f}",
        f"**{number(suite['kl_divergence'])}** ({number(low)} to {number(high)})",
        *(number(suite["domains"][name]["kl_divergence"]) for name in DOMAINS),
        *(number(row["figures"][name]["kl_divergence"]) for name in BESIDE if name in texts),
        number(suite["perplexity_ratio"]),
        f"{suite['top1_agreement']:.1%}",
    ]
    return f"| {' | '.join(cells)} |"


def with_table(readme: str, documents: dict[str, dict[str, Any]]) -> str:
    """Return the README with the best rows of the largest model at BITS bits."""
    model, document = list(documents.items())[-1]
    rows = sorted((row for row in document["rows"] if bits_of(row) == BITS), key=mean_of)
    lines = [f"{model} | MB | bits a weight | KL on five domains | worst domain | perplexity over float | top-1"]
    for row in rows[:TOP]:
        name, size, bpw = method_of(row), row["size_bytes"] / 1e6, row["bits_per_weight"]
        lines.append(" | ".join([f"{name}, {bits_of(row)} bits", f"{size:.0f}", f"{bpw:.2f}", *_suite_cells(row)]))
    lines.insert(1, "|".join(["---"] * 7))
    count = next(iter(document["texts"]["suite"]["windows"].values()))
    calibrated = sorted({windows_of(row) for row in rows[:TOP]} - {"-"}, key=int)
    title = f"{' or '.join(calibrated)} windows of text calibrated, {count} of each of five domains measured:\n\n"
    table = title + "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)
    return between(readme, ("<!-- measured:begin -->\n", "\n<!-- measured:end -->"), table)


def leaders(documents: dict[str, dict[str, Any]]) -> str:
    """Return the leaderboard's tables of all models, bitmill's methods and other programs, best first."""
    lines: list[str] = []
    for model, document in documents.items():
        for bits in sorted({bits_of(row) for row in document["rows"]}, reverse=True):
            lines += [f"### {model}, {bits} bits", ""]
            lines += [
                "| method | windows | bpw | KL | worst domain | perplexity over float | top-1 |",
                "|---" * 7 + "|",
            ]
            for row in sorted((row for row in document["rows"] if bits_of(row) == bits), key=mean_of):
                cells = [method_of(row), windows_of(row), f"{row['bits_per_weight']:.3f}", *_suite_cells(row)]
                lines.append(f"| {' | '.join(cells)} |")
            lines.append("")
    return "\n".join(lines[:-1])


def _suite_cells(row: dict[str, Any]) -> list[str]:
    """Return mean and worst divergence on the suite, the ratio of perplexities and the top-1 agreement."""
    suite = row["figures"]["suite"]
    worst = max(DOMAINS, key=lambda name: suite["domains"][name]["kl_divergence"])
    return [
        number(suite["kl_divergence"]),
        f"{number(suite['domains'][worst]['kl_divergence'])} ({worst})",
        number(suite["perplexity_ratio"]),
        f"{suite['top1_agreement']:.1%}",
    ]


def between(text: str, marks: tuple[str, str], inside: str) -> str:
    """Return a text with the part between two marks replaced."""
    begin, end = marks
    return re.sub(rf"{begin}.*?{end}", lambda _: begin + inside + end, text, flags=re.DOTALL)


def bits_of(row: dict[str, Any]) -> int:
    """Return the bits that a row was asked for: with bitmill those of the codes, to which metadata is added."""
    return int(row["bits"] if row.get("recipe") is None else row["bits_per_weight"])


def method_of(row: dict[str, Any]) -> str:
    """Return the name of the method, behind its program where that is not bitmill."""
    if row["tool"] != "bitmill":
        setting = row["name"].removeprefix(f"{row['tool']}-")  # a number repeats the bits
        return row["tool"] if setting.isdigit() else f"{row['tool']} {setting}"
    epochs = row["trained"]["epochs"] if row.get("trained") else 0
    return f"`{row['recipe']['name']}`{f', trained {epochs} epoch' + 's' * (epochs > 1) if epochs else ''}"


def windows_of(row: dict[str, Any]) -> str:
    """Return the number of calibration windows, "-" for a row that was made without text."""
    if row["tool"] == "bitmill":
        return str(row["calibration"]["samples"]) if row["calibration"] else "-"
    return "-" if "without calibration" in row["settings"] else str(PEER_WINDOWS)


def mean_of(row: dict[str, Any]) -> float:
    """Return the mean divergence on the suite."""
    return float(row["figures"]["suite"]["kl_divergence"])


def number(value: float) -> str:
    """Return a figure with three decimals, or three digits where it is large."""
    return f"{value:.3f}" if value < 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
