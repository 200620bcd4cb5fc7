"""Turn results about packed caches into docs/kv-measured.md: `python benchmarks/kv_page.py`.

Nothing is measured here: every figure is taken from benchmarks/results/kv_*.json.
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
    """docs/kv-measured.md."""
    lines = ["# Keys and values, measured", ""]
    for name, part in (
        ("quality", quality),
        ("retrieval", retrieval),
        ("attention", attention),
        ("memory", memory),
    ):
        path = RESULTS / f"kv_{name}.json"
        if path.is_file():
            lines += [*part(json.loads(path.read_text(encoding="utf-8"))), ""]
    return "\n".join(lines)


def quality(results: dict[str, Any]) -> list[str]:
    """Perplexity of all rows, and the steps of KVQuant."""
    rows = [row for key, row in results["rows"].items() if key != "float"]
    plain = results["rows"]["float"]["perplexity"]
    steps = [row for row in rows if row["name"] not in _WHOLE]
    whole = sorted((row for row in rows if row["name"] in _WHOLE), key=_order)
    head = [
        "## Quality",
        "",
        f"{results['model']}, {results['windows']} windows of {results['seqlen']} tokens of the evaluation text, "
        f"calibrated on {results['samples']} windows of the other text. Full pages are read packed and the last "
        f"tokens in float, as in generation. Perplexity of the float cache: {plain:.3f}.",
        "",
        "    python benchmarks/kv_quality.py",
        "",
        f"| method | {_COLUMNS} |",
        "|---|---|---|---|---|---|---|",
        *(_row(row["name"], row, plain) for row in whole),
    ]
    parts = [
        "",
        "### What each part of KVQuant is worth",
        "",
        "Each row adds to the one above, but that Q-Norm is left out again after its own. From *levels of each "
        "key channel* on they are bitmill's.",
        "",
        f"| part | {_COLUMNS} |",
        "|---|---|---|---|---|---|---|",
        *(_row(row["name"].removeprefix("+ "), row, plain) for row in steps),
    ]
    return head + (parts if steps else [])


_COLUMNS = "bits of a code | perplexity | over float | KL | same first token | bits a number at 8192 tokens"
_PAPER = "kvquant, the paper's levels and shares"
_WHOLE = ("kvquant", _PAPER, "kivi", "rotated", "per_token, a scale a head", "per_token")


def _order(row: dict[str, Any]) -> tuple[int, int]:
    return -row["method"]["bits"], _WHOLE.index(row["name"])


def _row(name: str, row: dict[str, Any], plain: float) -> str:
    over = row["perplexity"] / plain - 1
    figures = f"{row['perplexity']:.3f} | {over:+.2%} | {row['kl_divergence']:.4f} | {row['top1_agreement']:.1%}"
    return f"| {name} | {row['method']['bits']} | {figures} | {row['kv_bits_at_8k']:.3f} |"


def retrieval(results: dict[str, Any]) -> list[str]:
    """Pass keys that were found."""
    return [
        "## Retrieval",
        "",
        f"A pass key in {results['context']} tokens of text, at depths spread over it, asked for at the end. The "
        "text is read in float, packed, and the question is answered from what is packed.",
        "",
        "    python benchmarks/kv_retrieval.py",
        "",
        "| cache | keys found | mean log-probability of the key's tokens |",
        "|---|---|---|",
        *(
            f"| {name} | {row['found']} of {row['keys']} | {row['log_probability']:.3f} |"
            for name, row in results["rows"].items()
        ),
    ]


def attention(results: dict[str, Any]) -> list[str]:
    """Time of one layer's attention of one token."""
    return [
        "## Speed of attention",
        "",
        f"One token on {results['tokens']} packed tokens of a layer, {results['threads']} threads, medians of "
        f"{results['turns']} turns, beside torch's fp32 attention on fp32 keys and values in the same turns, the "
        "better of its two forms. Layers take turns, so that none is in a cache.",
        "",
        "    python benchmarks/kv_attention.py",
        "",
        "| layer and method | bits a number | packed | torch | faster | of read bandwidth |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {row['bits']:.2f} | {1e6 * row['packed_s']:.0f} us | "
            f"{1e6 * min(row['gqa_s'], row['grouped_s']):.0f} us | {row['ratio']:.2f} x | "
            f"{row['fraction_of_read_bandwidth']:.0%} |"
            for name, row in results["rows"].items()
        ),
    ]


def memory(results: dict[str, Any]) -> list[str]:
    """Peak memory of whole processes."""
    plain = results["rows"]["float"]
    return [
        "## Memory",
        "",
        f"A process that reads {results['context']} tokens in parts of 512 into {results['model']} with float "
        f"weights and goes on from them, {results['threads']} threads. *Fallen* is by how much the peak is lower "
        f"than with the ordinary fp32 cache, over that cache's {plain['cache_bytes'] / 1e6:.0f} MB.",
        "",
        "    python benchmarks/kv_memory.py",
        "",
        "| cache | its bytes | peak of the process | fallen | a token | reading |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {row['cache_bytes'] / 1e6:.0f} MB | {row['peak_memory_bytes'] / 1e6:.0f} MB | "
            f"{row['fallen_over_float_cache']:.2f} | {1e3 * row['token_s']:.0f} ms | {row['prefill_s']:.0f} s |"
            for name, row in results["rows"].items()
        ),
    ]


if __name__ == "__main__":
    main()
