"""Which bits and groups a model tolerates, before any text is read: round every layer in every way, once.

The model goes by one block at a time. Each linear of a block is rounded to nearest in every cell of a table
(bits x group sizes, and the 4- and 8-bit floats); with text, windows travel through the blocks of every cell
beside the float model, so that all cells together need the memory of one block and their hidden states.

error   relative squared error of the weights of a layer, sum (W - W^)^2 / sum W^2
SQNR    the same in decibels, -10 log10(error): the signal's power over that of the rounding noise
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.data.text import Windows
from bitmill.data.windows import check_context_length
from bitmill.errors import NumericsError, UsageError
from bitmill.evaluation.metrics import LanguageModelMetrics
from bitmill.formats.quantized import Quantized
from bitmill.models.streamed import StreamedModel
from bitmill.numerics.grouping import GroupSize
from bitmill.pipeline.measure import HeldOutMetrics
from bitmill.progress import Progress, peak_memory_bytes
from bitmill.recipes.method import build_recipe
from bitmill.recipes.recipe import Recipe
from bitmill.report.verdicts import summarize, verdict
from bitmill.solvers import Statistics
from bitmill.solvers.base import output_error, solve
from bitmill.sources.open import open_source
from bitmill.workflows.checks import check_device

BITS = (8, 6, 5, 4, 3, 2)
SIZES: tuple[GroupSize, ...] = ("tensor", "row", 128, 64, 32)
FLOATS = ("fp8", "nf4", "nvfp4", "mxfp4")


@dataclass
class Cell:
    """One way to round, and what came of it.

    errors: layer -> relative squared error of its weights.  comparison: with the float model's predictions.
    """

    recipe: Recipe
    bits: int
    group_size: GroupSize
    errors: dict[str, float] = field(default_factory=dict)
    stored_bits: int = 0
    comparison: LanguageModelMetrics = field(default_factory=LanguageModelMetrics)

    def solve(self, name: str, W: Tensor) -> Tensor:
        """Round one layer; returns the stored numbers."""
        quantized: Quantized = solve(self.recipe.solver, W, Statistics(), self.recipe.stored)
        decoded = quantized.dequantize()
        self.errors[name] = output_error(W, decoded, None)
        self.stored_bits += quantized.format.stored_bits(quantized.shape)
        return decoded

    def result(self, weights: int) -> dict[str, Any]:
        """The cell as plain data; `weights` is how many there are."""
        worst = max(self.errors, key=lambda name: self.errors[name])
        mean = sum(self.errors.values()) / len(self.errors)
        measured: dict[str, float | int] = {}
        if self.comparison.predicted:
            try:
                measured = self.comparison.result()
            except NumericsError:  # the cell is beyond measuring, and the others are not
                measured = {"kl_divergence": math.inf}
        return {
            "method": self.recipe.name,
            "bits": self.bits,
            "group_size": self.group_size,
            "bits_per_weight": self.stored_bits / weights,
            "weight_error": mean,
            "sqnr_db": decibels(mean),
            "worst_layer": worst,
            "worst_sqnr_db": decibels(self.errors[worst]),
            **{key: measured.get(key) for key in ("perplexity", "kl_divergence", "top1_agreement")},
        }


def cells(search: bool) -> list[Cell]:
    """The table, rows of falling bits and groups."""
    options: list[tuple[str, dict[str, Any]]] = [
        ("rtn", {"bits": bits, "group_size": size}) for bits in BITS for size in SIZES
    ]
    made = []
    for method, values in [*options, *((name, {}) for name in FLOATS)]:
        recipe = build_recipe(method, {**values, "search": search})
        core = recipe.stored.core
        made.append(Cell(recipe, core.bits, core.group_size))
    return made


def decibels(error: float) -> float:
    """-10 log10(error); infinite without error."""
    return -10 * math.log10(error) if error > 0 else math.inf


@torch.no_grad()
def sweep(
    model: str | Path | nn.Module,
    *,
    text_source: str | None = None,
    windows: int = 4,
    seqlen: int = 512,
    search: bool = False,
    device: str = "cpu",
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Round every layer of a model in every cell of the table.

    text_source: text to measure perplexity and KL divergence on, `windows` windows of `seqlen` tokens of its last
        fifth; without it no text is read.
    search: shrink ranges to the least squared error instead of taking the largest magnitudes.

    Returns plain data: `cells`, `layers` (which suffer most first), `kinds` of layers, `verdicts`. Raises
    BitmillError subclasses, each with one sentence.
    """
    started = time.perf_counter()
    if windows < 1:
        raise UsageError(f"windows is {windows}; use 1 or more, or leave the text away.")
    check_device(device)
    progress = progress or Progress()
    progress.start("opening the model", 0)
    source = open_source(model, trust_remote_code=trust_remote_code, tokenizer=tokenizer)
    streamed = StreamedModel(source, device)
    chosen = None
    if text_source is not None:
        if not streamed.task.generates:
            raise UsageError(
                f"{source.name} is {streamed.task.description}, which has no perplexity; leave out the text."
            )
        check_context_length(source.config, seqlen)
        chosen = streamed.task.windows(text_source, source.tokenizer()).held_out("eval", seqlen, windows)
    table = cells(search)
    shapes = _walk(streamed, table, chosen, progress)
    weights = sum(rows * columns for rows, columns in shapes.values())
    results = [cell.result(weights) for cell in table]
    for result in results:
        result["verdict"] = verdict(result)
    layers = _layers(table, shapes)
    measured = None
    if chosen is not None:
        reference = table[0].comparison.result()["reference_perplexity"]
        described = {
            "text": str(text_source),
            "split": "eval",
            "seqlen": seqlen,
            "windows": len(chosen),
        }
        measured = {**described, "reference_perplexity": reference}
    return {
        "model": source.name,
        "search": search,
        "quantized_weights": weights,
        "measured": measured,
        "cells": results,
        "verdicts": summarize(results),
        "layers": layers,
        "kinds": _kinds(layers, streamed.adapter.linears),
        "time_s": round(time.perf_counter() - started, 3),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _walk(
    streamed: StreamedModel, table: list[Cell], windows: Windows | None, progress: Progress
) -> dict[str, tuple[int, int]]:
    """Fill the cells; returns the shape of every layer."""
    shapes: dict[str, tuple[int, int]] = {}
    measure = None
    streams: list[list[Tensor]] = []
    if windows is not None:
        with streamed.non_block_weights("embedding"):
            measure = HeldOutMetrics(streamed, windows)
        streams = [list(measure.float) for _ in table]
    progress.start("sweep", len(streamed.blocks))
    for index in range(len(streamed.blocks)):
        block = streamed.load_block(index)
        originals = {f"{streamed.block_name(index)}.{name}": name for name in streamed.adapter.linears}
        matrices = {full: streamed.matrix(f"{full}.weight") for full in originals}
        shapes |= {full: (W.shape[0], W.shape[1]) for full, W in matrices.items()}
        if measure:
            measure.advance_float(block, index)
        for number, cell in enumerate(table):
            for full, W in matrices.items():
                decoded = cell.solve(full, W)
                if measure:
                    streamed.set_matrix(f"{full}.weight", decoded)
            if measure:
                calls = [calls[index] for calls in measure.calls]
                streams[number] = [call.run(block, hidden) for call, hidden in zip(calls, streams[number])]
        streamed.free_block(index)
        progress.advance()
    progress.finish()
    if measure is not None:
        _compare(measure, table, streams, progress)
    return shapes


def _compare(measure: HeldOutMetrics, table: list[Cell], streams: list[list[Tensor]], progress: Progress) -> None:
    """Add every window's predictions to the cells, the float model's computed once."""
    streamed = measure.streamed
    progress.start("compare", len(measure.float))
    with streamed.non_block_weights("head"):
        for number, (window, hidden) in enumerate(zip(measure.windows, measure.float)):
            tokens = window[None]
            reference = streamed.head(tokens, hidden)
            for cell, stream in zip(table, streams):
                cell.comparison.add(tokens, streamed.head(tokens, stream[number]), reference)
            progress.advance()
    progress.finish()


def _layers(table: list[Cell], shapes: dict[str, tuple[int, int]]) -> list[dict[str, Any]]:
    """Every layer's error relative to the mean layer's, averaged over cells; those that suffer most first."""
    relative = dict.fromkeys(shapes, 0.0)
    for cell in table:
        mean = sum(cell.errors.values()) / len(cell.errors)
        for name, error in cell.errors.items():
            relative[name] += error / max(mean, 1e-30) / len(table)
    ordered = sorted(shapes, key=lambda name: (-relative[name], name))
    return [{"name": name, "shape": list(shapes[name]), "relative_error": relative[name]} for name in ordered]


def _kinds(layers: list[dict[str, Any]], linears: tuple[str, ...]) -> list[dict[str, Any]]:
    """The same by kind of layer, over all blocks."""
    made = []
    for linear in linears:
        own = [layer["relative_error"] for layer in layers if layer["name"].endswith(f".{linear}")]
        made.append({"name": linear, "layers": len(own), "relative_error": sum(own) / max(len(own), 1)})
    return sorted(made, key=lambda kind: -kind["relative_error"])
