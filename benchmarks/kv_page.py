"""Write docs/kv-measured.md from the results of packed caches: `python benchmarks/kv_page.py`.

Every figure is read from benchmarks/results/kv_*.json; nothing is measured here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "kv-measured.md"


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """Return the text of docs/kv-measured.md."""
    lines = ["# Keys and values, measured", ""]
    for name, part in (
        ("quality", quality),
        ("suite", suite),
        ("whole", whole),
        ("steps", steps),
        ("retrieval", retrieval),
        ("attention", attention),
        ("attention-avx2", attention_with_less),
        ("decode", decode),
        ("memory", memory),
    ):
        path = RESULTS / f"kv_{name}.json"
        if path.is_file():
            lines += [*part(json.loads(path.read_text(encoding="utf-8"))), ""]
    return "\n".join(lines)


def quality(results: dict[str, Any]) -> list[str]:
    """Return perplexity of all methods, and the targets of KVQuant."""
    return [
        "## Quality",
        "",
        f"{_terms(results)} Full pages are read packed and the last tokens in fp16, as in generation.",
        "",
        f"    python benchmarks/kv_quality.py --windows {results['windows']}",
        "",
        *_table_with_targets(results),
    ]


def suite(results: dict[str, Any]) -> list[str]:
    """Return the divergence on the domains of the suite."""
    rows = sorted((row for key, row in results["rows"].items() if key != "float"), key=_order)
    domains = list(rows[0]["domains"])
    each = results["windows"] // len(domains)
    return [
        "### On five domains",
        "",
        f"{results['model']}, {each} windows of {results['seqlen']} tokens of each domain of the "
        f"[suite](texts.md), calibrated on {results['samples']} windows of the mixture. KL in nats a token, its "
        "mean with the 95 % interval; the ratio of perplexities over an ordinary cache.",
        "",
        f"    python benchmarks/kv_quality.py --text suite --windows {each}",
        "",
        f"| method | bits of a code | KL | {' | '.join(domains)} | ratio | bits per number at 8192 tokens |",
        f"|---|---|---|{'---|' * len(domains)}---|---|",
        *(_suite_row(row, domains) for row in rows),
    ]


def _suite_row(row: dict[str, Any], domains: list[str]) -> str:
    low, high = row["kl_interval"]
    by_domain = " | ".join(f"{row['domains'][name]['kl_divergence']:.4f}" for name in domains)
    mean = f"**{row['kl_divergence']:.4f}** ({low:.4f} to {high:.4f})"
    over, bits = f"{1 + _over(row):.4f}", f"{row['kv_bits_at_8k']:.3f}"
    return f"| {row['name']} | {row['method']['bits']} | {mean} | {by_domain} | {over} | {bits} |"


def whole(results: dict[str, Any]) -> list[str]:
    """Return perplexity on all windows, for some of the methods."""
    command = "    python benchmarks/kv_quality.py --windows 0 --out benchmarks/results/kv_whole.json --only"
    return [
        "### On the whole evaluation text",
        "",
        _terms(results),
        "",
        f"{command} 'kvquant: '",
        f"{command} 'kivi: '",
        "",
        *_table_with_targets(results),
    ]


def _table_with_targets(results: dict[str, Any]) -> list[str]:
    rows = sorted((row for key, row in results["rows"].items() if key != "float"), key=_order)
    return [
        f"| method | {_COLUMNS} |",
        "|---|---|---|---|---|---|---|",
        *(_row(row["name"], row) for row in rows),
        "",
        *targets({(row["name"], row["method"]["bits"]): row for row in rows}),
    ]


def targets(rows: dict[tuple[str, int], dict[str, Any]]) -> list[str]:
    """Return the targets set for KVQuant before it was measured, and the measurements."""
    lines = ["Targets of `kvquant`, set before it was measured:", "", "| target | measured | |", "|---|---|---|"]
    for bits, most, most_bits in ((4, 0.005, 4.6), (3, 0.02, 3.6), (2, 0.15, 2.6)):
        if ("kvquant", bits) in rows:
            row = rows["kvquant", bits]
            over, size = _over(row), row["kv_bits_at_8k"]
            lines += [
                f"| {bits} bits: perplexity at most {most:.1%} over float | {over:+.2%} | "
                f"{_verdict(over <= most)} |",
                f"| {bits} bits: at most {most_bits} allocated bits per number at 8192 tokens | {size:.3f} | "
                f"{_verdict(size <= most_bits)} |",
            ]
    for name, bits in (("kvquant", 4), ("kvquant", 3), ("kvquant", 2), (_AS_LARGE, 4)):
        if (name, bits) in rows and ("kivi", bits) in rows:
            ours, theirs = rows[name, bits], rows["kivi", bits]
            sizes = f"{ours['kv_bits_at_8k']:.2f} bits per number to its {theirs['kv_bits_at_8k']:.2f}"
            lines += [
                f"| {bits} bits: {measure} below KIVI's, with {sizes} | {ours[key]:.4f} and {theirs[key]:.4f} | "
                f"{_verdict(ours[key] < theirs[key])} |"
                for key, measure in (("perplexity", "perplexity"), ("kl_divergence", "KL"))
            ]
    return lines


def _verdict(met: bool) -> str:
    return "met" if met else "**missed**"


def steps(results: dict[str, Any]) -> list[str]:
    """Return the ablation of KVQuant's parts."""
    rows = [row for key, row in results["rows"].items() if key != "float"]
    return [
        "### Ablation of KVQuant",
        "",
        f"{_terms(results)} Each row adds a part to the row above, except that Q-Norm is "
        "left out after its own row. The parts from *levels of each key channel* on are bitmill's.",
        "",
        "    python benchmarks/kv_quality.py --steps --windows 4",
        "",
        f"| part | {_COLUMNS} |",
        "|---|---|---|---|---|---|---|",
        *(_row(row["name"].removeprefix("+ "), row) for row in rows),
    ]


def _terms(results: dict[str, Any]) -> str:
    return (
        f"{results['model']}, {results['windows']} windows of {results['seqlen']} tokens of the evaluation text, "
        f"calibrated on {results['samples']} windows of the calibration split. Perplexity of the float cache: "
        f"{results['rows']['float']['perplexity']:.3f}."
    )


_COLUMNS = "bits of a code | perplexity | over float | KL | top-1 agreement | bits per number at 8192 tokens"
_AS_LARGE = "kvquant, as many bits as kivi"
_NAMES = (
    "kvquant",
    _AS_LARGE,
    "kvquant, the paper's levels and shares",
    "kivi",
    "rotated",
    "per_token",
)


def _order(row: dict[str, Any]) -> tuple[int, int]:
    return -row["method"]["bits"], _NAMES.index(row["name"])


def _over(row: dict[str, Any]) -> float:
    return float(row["perplexity"] / row["reference_perplexity"] - 1)


def _row(name: str, row: dict[str, Any]) -> str:
    figures = (
        f"{row['perplexity']:.3f} | {_over(row):+.2%} | {row['kl_divergence']:.4f} | {row['top1_agreement']:.1%}"
    )
    return f"| {name} | {row['method']['bits']} | {figures} | {row['kv_bits_at_8k']:.3f} |"


def retrieval(results: dict[str, Any]) -> list[str]:
    """Return the share of numbers that were retrieved."""
    texts = results["texts"]
    contexts = ", ".join(str(text["context"]) for text in texts)
    head = " | ".join(f"found in {text['context']} tokens | log-probability" for text in texts)
    lines = [
        "## Retrieval",
        "",
        f"{results['keys']} numbers in each text, at even depths, each after words that occur nowhere else, "
        f"stated twice. The question repeats the words. Texts of {contexts} tokens from the evaluation "
        "split are read in float and packed, and every question is answered from the packed cache; a number "
        "counts where all its "
        "tokens are the most likely ones. Log-probabilities are means over the answers' tokens. Calibrated on "
        f"{results['samples']} windows of 2048 tokens of the calibration split.",
        "",
        f"    python benchmarks/kv_retrieval.py --contexts {','.join(map(str, results['contexts']))} "
        f"--keys {results['keys']} --samples {results['samples']}",
        "",
        f"| cache | {head} |",
        f"|---|{'---|---|' * len(texts)}",
    ]
    for name in texts[0]["rows"]:
        cells = [_found(text["rows"][name]) for text in texts if name in text["rows"]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name in ("kvquant 4", "kvquant 3"):
        pairs = [(text["rows"]["float"]["found"], text["rows"][name]["found"]) for text in texts]
        counts = ", ".join(f"{ours.count('x')} of its {plain.count('x')}" for plain, ours in pairs)
        met = all(ours.count("x") >= plain.count("x") for plain, ours in pairs)
        lines += ["", f"Target: `{name}` finds as many as the float cache. Measured: {counts}; {_verdict(met)}."]
    return lines


def _found(row: dict[str, Any]) -> str:
    return f"{row['found'].count('x')} of {len(row['found'])} | {row['log_probability']:.3f}"


def attention(results: dict[str, Any]) -> list[str]:
    """Return the time of the attention of one token in one layer."""
    return [
        "## Speed of attention",
        "",
        f"One token on {results['tokens']} packed tokens of a layer, {results['threads']} threads, medians of "
        f"{results['turns']} rounds, compared with torch's fp32 attention on fp32 keys and values in these "
        "rounds, the faster of its two forms. Layers alternate, so that none stays in a CPU cache. "
        f"{results['isa']}, measured {results['measured']}.",
        "",
        "    python benchmarks/kv_attention.py",
        "",
        *_attention_table(results),
    ]


def attention_with_less(results: dict[str, Any]) -> list[str]:
    """Return these times with a smaller instruction set."""
    return [
        f"### With {results['isa']}",
        "",
        f"On another, shared machine without AVX-512, whose figures vary; {results['turns']} rounds, measured "
        f"{results['measured']}.",
        "",
        *_attention_table(results),
    ]


def _attention_table(results: dict[str, Any]) -> list[str]:
    return [
        "| layer and method | bits per number | packed | torch | speedup | of read bandwidth |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {row['bits']:.2f} | {1e6 * row['packed_s']:.0f} us | "
            f"{1e6 * min(row['gqa_s'], row['grouped_s']):.0f} us | {row['ratio']:.2f} x | "
            f"{row['fraction_of_read_bandwidth']:.0%} |"
            for name, row in results["rows"].items()
        ),
    ]


def decode(results: dict[str, Any]) -> list[str]:
    """Return the time of whole tokens."""
    rows = results["rows"]
    methods = [name for name in next(iter(rows.values())) if name != "float"]
    head = " | ".join(f"{name} | speedup" for name in methods)
    return [
        "## Speed of decoding",
        "",
        f"{results['model']} with float weights, one compiled call per token, packing included: milliseconds per "
        f"token by context, {results['threads']} threads, {results['isa']}, medians of {results['turns']} rounds "
        "of 32 tokens, compared with the ordinary fp32 cache in these rounds.",
        "",
        "    python benchmarks/kv_decode.py",
        "",
        f"| context | float | {head} |",
        f"|---|---|{'---|---|' * len(methods)}",
        *(
            f"| {context} | {row['float']['token_ms']:.1f} ms | "
            + " | ".join(f"{row[name]['token_ms']:.1f} ms | {row[name]['faster']:.2f} x" for name in methods)
            + " |"
            for context, row in rows.items()
        ),
    ]


def memory(results: dict[str, Any]) -> list[str]:
    """Return the peak memory of whole processes."""
    rows = dict(results["rows"])
    base, plain = rows.pop("forgets"), rows["float"]
    return [
        "## Memory",
        "",
        f"A process that reads {results['context']} tokens in chunks of 512 into {results['model']} with float "
        f"weights and generates from them, {results['threads']} threads. *Added* is its peak minus the "
        f"{_megabytes(base['peak_memory_bytes'])} of a process that drops every chunk before the next one; "
        "*reduction* is the ratio to the ordinary fp32 cache.",
        "",
        f"    python benchmarks/kv_memory.py --context {results['context']} --methods {','.join(list(rows)[1:])}",
        "",
        "| cache | bytes | reduction | peak of the process | added | reduction |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {_megabytes(row['cache_bytes'])} | {plain['cache_bytes'] / row['cache_bytes']:.1f} x | "
            f"{_megabytes(row['peak_memory_bytes'])} | {_megabytes(row['added_bytes'])} | "
            f"{plain['added_bytes'] / row['added_bytes']:.1f} x |"
            for name, row in rows.items()
        ),
    ]


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.0f} MB"


if __name__ == "__main__":
    main()
