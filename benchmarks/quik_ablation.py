"""Ablation of QUIK: float columns, bits of the second MLP layer and a rotation, with the speed of prompts.

    python benchmarks/quik_ablation.py --cache FOLDER        # let the machine do nothing else
    python benchmarks/quik_ablation.py --cache FOLDER --only "64 columns, down 8"

Weights and inputs have 4 bits. Variants: 0, 32, 64 or 128 columns in float, `down_proj` at 4 or 8 bits, with and
without a rotation; without any of the three it is plain W4A4. Every folder is measured against the float model on
the part of the suite that is there to choose, and its prompts against float32, bfloat16 and W8A8 in turns. The
float model runs once for all variants, and up to four of them are measured together. Folders stay in the cache
and rows in benchmarks/results/quik.json, so that the command continues where it stopped; the table of
docs/evidence.md is written from them.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from suite import TOGETHER, Recorded, Windows, score

import bitmill
from bitmill.data.windows import CalibrationData
from bitmill.runtime.decode import detach
from bitmill.workflows.bench.models import prefill_time
from bitmill.workflows.load import load_tokenizer
from bitmill.workflows.machine import describe_machine
from bitmill.workflows.sizes import stored_bits

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "quik.json"
PAGE = ROOT / "docs" / "evidence.md"
BEGIN, END = "<!-- quik:begin -->", "<!-- quik:end -->"
COLUMNS = (0, 32, 64, 128)
PROMPT, SEQLEN = 512, 512  # tokens
REFERENCES = ("float32", "bfloat16", "w8a8")


def variants() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the options of `quik` of every variant."""
    for rotate in (False, True):
        for down in (4, 8):
            for columns in COLUMNS:
                parts = [f"{columns} columns", f"down {down}", *(["rotated"] if rotate else [])]
                name = "plain W4A4" if (columns, down, rotate) == (0, 4, False) else ", ".join(parts)
                yield name, {"columns": columns, "down_bits": down, "rotate": rotate}


def main() -> None:
    """Measure the variants that have no row yet, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder of the quantized models")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--samples", type=int, default=32, help="windows that calibrate")
    parser.add_argument("--windows", type=int, default=6, help="windows of each domain that are measured")
    parser.add_argument("--turns", type=int, default=5, help="prompts that are timed")
    parser.add_argument("--only", help="name of one variant")
    parser.add_argument("--results", type=Path, default=RESULTS, help="another file, which writes no table")
    given = parser.parse_args()
    chosen = {name: options for name, options in variants() if given.only in (None, name)}
    if not chosen:
        parser.error(f"--only is {given.only!r}; use one of: {'; '.join(name for name, _ in variants())}")
    settings = {name: getattr(given, name) for name in ("model", "samples", "windows", "turns")}
    found = read(given.results, settings)
    missing = [name for name in chosen if name not in {row["name"] for row in found["rows"]}]
    for start in range(0, len(missing), TOGETHER):
        for row in measure({name: chosen[name] for name in missing[start : start + TOGETHER]}, given):
            found["rows"].append(row)
            write(given.results, found)
            print(json.dumps(row), flush=True)
    if given.results == RESULTS:
        text = PAGE.read_text(encoding="utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{after}", encoding="utf-8")


def read(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the rows of a file, none where it was made with other settings or does not exist."""
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    fresh = {"settings": settings, "machine": describe_machine("cpu"), "rows": []}
    return found if found.get("settings") == settings else fresh


def write(file: Path, found: dict[str, Any]) -> None:
    """Replace a file in one step."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    os.replace(part, file)


def measure(chosen: dict[str, dict[str, Any]], given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row of quality and speed of each variant.

    Args:
        chosen: name -> options of `quik`.
        given: the command's arguments.
    """
    folders = {name: quantized(given, "quik", name, options) for name, options in chosen.items()}
    texts, reference = float_model(given.model, given.windows)
    keys = ("kl_divergence", "perplexity", "perplexity_ratio")
    scores = score(list(folders.values()), reference, texts)
    for (name, folder), figures in zip(folders.items(), scores):
        quality = {
            "bits_per_weight": stored_bits(folder, False)[0],
            **{key: figures["suite"][key] for key in keys},
        }
        yield {"name": name, **chosen[name], **quality, **speed(folder, given)}


@cache
def float_model(model: str, windows: int) -> tuple[dict[str, Windows], Recorded]:
    """Return the windows that are measured, and the float model's outputs on them."""
    texts = {"suite": Windows("suite", load_tokenizer(model), windows, SEQLEN, "choose")}
    return texts, Recorded(bitmill.load(model), texts)


def quantized(given: argparse.Namespace, method: str, name: str, options: dict[str, Any]) -> Path:
    """Return the folder of a variant, which is made where it does not exist."""
    folder = given.cache / f"{Path(given.model).name}-{given.samples}-{name.replace(', ', '-').replace(' ', '-')}"
    if not folder.exists():
        calib = CalibrationData("mix", samples=given.samples)
        bitmill.quantize(given.model, method, out=folder, calib=calib, measure=0, progress=False, **options)
    return folder


@torch.no_grad()
def speed(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds until the first token after a prompt, of the folder and of each reference, in turns.

    Returns:
        time_to_first_token_s, that of each reference by name, and the share of the processors that other work had.
    """
    models = {
        "time_to_first_token_s": bitmill.load(str(folder)),
        "float32": detach(bitmill.load(given.model, dtype=torch.float32)),
        "bfloat16": detach(bitmill.load(given.model, dtype=torch.bfloat16)),
        "w8a8": bitmill.load(str(quantized(given, "w8a8", "w8a8", {}))),
    }
    vocabulary = int(models["float32"].config.vocab_size)
    prompt = torch.randint(0, vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # the first prompt repacks weights
        for live in models.values():
            prefill_time(live, prompt)
    busy = psutil.cpu_percent(interval=1) / 100
    times = [[prefill_time(live, prompt) for live in models.values()] for _ in range(given.turns)]
    return {**{name: median(column) for name, column in zip(models, zip(*times))}, "busy": busy}


def table(found: dict[str, Any]) -> str:
    """Return a markdown table: quality, and the speed of prompts over that of each reference."""
    settings = found["settings"]
    lines = [
        f"{settings['model']}, calibrated on {settings['samples']} windows of `mix`, measured on "
        f"{settings['windows']} of each domain; prompts of {PROMPT} tokens, medians of {settings['turns']}:",
        "",
        "| variant | bpw | KL | perplexity over float | x float32 | x bfloat16 | x W8A8 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        ratios = " | ".join(f"{row[name] / row['time_to_first_token_s']:.2f}" for name in REFERENCES)
        lines.append(
            f"| {row['name']} | {row['bits_per_weight']:.3f} | {row['kl_divergence']:.4f} "
            f"| {row['perplexity_ratio']:.4f} | {ratios} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
