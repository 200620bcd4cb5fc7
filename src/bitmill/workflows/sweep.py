"""Round every layer of a model in every format of a table, to find out which bits and groups the model tolerates.

One block is in memory at a time. Each linear is rounded to nearest in every cell of the table (bits x group sizes,
and the 4- and 8-bit floats). With text, windows pass the blocks of every cell and of the float model, so that all
cells together need the memory of one block and their hidden states.

error   relative squared error of the weights of a layer, sum (W - W^)^2 / sum W^2
SQNR    the error in decibels, -10 log10(error): the power of the signal over that of the rounding noise
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.calibration.walk import HiddenStates, walk_blocks
from bitmill.config.arguments import checked_arguments, renamed_arguments
from bitmill.data.text import Windows
from bitmill.data.windows import check_context_length, check_vocabulary
from bitmill.errors import NumericsError, UsageError
from bitmill.evaluation.metrics import LanguageModelMetrics
from bitmill.formats.quantized import Quantized
from bitmill.models.streamed import StreamedModel
from bitmill.numerics.grouping import GroupSize
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

Shape = tuple[int, int]


@dataclass
class Cell:
    """One format, and the results of rounding with it.

    Attributes:
        recipe: data-free recipe of one format.
        bits: bits of a code.
        group_size: weights that share a scale.
        errors: full name of a layer -> relative squared error of its weights.
        stored_bits: size of all layers.
        metrics: comparison with the float model's predictions; empty without text.
    """

    recipe: Recipe
    bits: int
    group_size: GroupSize
    errors: dict[str, float] = field(default_factory=dict)
    stored_bits: int = 0
    metrics: LanguageModelMetrics = field(default_factory=LanguageModelMetrics)

    def quantize(self, layer: str, W: Tensor) -> Tensor:
        """Round one layer, note its error and size, and return the decoded weight.

        Args:
            layer: full name of the layer.
            W: its weight, fp32 (out, in).
        """
        scheme = self.recipe.default
        quantized: Quantized = solve(scheme.solver, W, Statistics(), scheme.format)
        decoded = quantized.dequantize()
        self.errors[layer] = output_error(W, decoded, None)
        self.stored_bits += quantized.format.stored_bits(quantized.shape)
        return decoded

    def result(self, weights: int) -> dict[str, Any]:
        """Return the cell as plain data.

        Args:
            weights: number of weights in all layers.
        """
        worst = max(self.errors, key=lambda layer: self.errors[layer])
        mean = sum(self.errors.values()) / len(self.errors)
        measured: dict[str, float | int] = {}
        if self.metrics.predicted:
            try:
                measured = self.metrics.result()
            except NumericsError:  # this cell cannot be measured, and others can
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


def sweep_cells(search: bool) -> list[Cell]:
    """Return the empty table, rows of falling bits and group sizes.

    Args:
        search: shrink each range to the least squared error.
    """
    options: list[tuple[str, dict[str, Any]]] = [
        ("rtn", {"bits": bits, "group_size": size}) for bits in BITS for size in SIZES
    ]
    cells = []
    for method, values in [*options, *((name, {}) for name in FLOATS)]:
        recipe = build_recipe(method, {**values, "search": search})
        core = recipe.default.format.core
        cells.append(Cell(recipe, core.bits, core.group_size))
    return cells


def decibels(error: float) -> float:
    """Return -10 log10(error); infinite without error."""
    return -10 * math.log10(error) if error > 0 else math.inf


@renamed_arguments(text_source="text")
@torch.no_grad()
@checked_arguments("progress")
def sweep(
    model: str | Path | nn.Module,
    *,
    text: str | None = None,
    windows: int = 4,
    seqlen: int = 512,
    search: bool = False,
    device: str = "cpu",
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Round every layer of a model in every cell of the table.

    Args:
        model: name or folder of a float model, or a module.
        text: text to measure perplexity and KL divergence on; no text is read without it.
        windows: windows of the text's last fifth to measure on.
        seqlen: tokens in a window.
        search: shrink ranges to the least squared error instead of taking the largest magnitudes.
        device: where to compute.
        tokenizer: tokenizer of a module.
        trust_remote_code: allow the model to run code of its own.
        progress: where progress is reported.

    Returns:
        Plain data: `cells`, `layers` (largest error first), `kinds` of layers, `verdicts`.

    Raises:
        BitmillError: In one sentence, if the model, the text or an option does not fit.
    """
    started = time.perf_counter()
    if windows < 1:
        raise UsageError(f"windows is {windows}; use 1 or more, or leave out the text.")
    check_device(device)
    progress = progress or Progress()
    progress.start("opening the model", 0)
    source = open_source(model, trust_remote_code=trust_remote_code, tokenizer=tokenizer)
    streamed = StreamedModel(source, device)
    held_out = None if text is None else _text_windows(streamed, text, windows, seqlen)
    cells = sweep_cells(search)
    shapes = fill_cells(streamed, cells, held_out, progress)
    measured = None
    if held_out is not None:
        measured = {"text": str(text), "split": "eval", "seqlen": seqlen, "windows": len(held_out)}
        measured["reference_perplexity"] = cells[0].metrics.result()["reference_perplexity"]
    return {
        "model": source.name,
        "search": search,
        **_describe(cells, shapes, streamed.adapter.linears, measured),
        "time_s": round(time.perf_counter() - started, 3),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _text_windows(streamed: StreamedModel, text_source: str, windows: int, seqlen: int) -> Windows:
    """Return held-out token windows of a text."""
    source = streamed.source
    if not streamed.task.generates:
        raise UsageError(
            f"{source.name} is {streamed.task.description}, which has no perplexity; leave out the text."
        )
    check_context_length(source.config, seqlen)
    held_out = streamed.task.windows(text_source, source.tokenizer()).held_out("eval", seqlen, windows)
    check_vocabulary(source.config, held_out)
    return held_out


def fill_cells(
    streamed: StreamedModel, cells: list[Cell], windows: Windows | None, progress: Progress
) -> dict[str, Shape]:
    """Round every layer in every cell.

    Args:
        streamed: the float model.
        cells: the table to fill.
        windows: token windows to compare predictions on; None for none.
        progress: where progress is reported.

    Returns:
        The shape (out, in) of every layer, by full name.
    """
    shapes: dict[str, Shape] = {}
    reference: HiddenStates | None = None
    streams: list[HiddenStates] = []
    if windows is not None:
        with streamed.non_block_weights("embedding"):
            reference = HiddenStates(streamed, [window[None] for window in windows])
        streams = [reference.fork() for _ in cells]
    progress.start("sweep", len(streamed.blocks))
    for index, block in walk_blocks(streamed, progress):
        layers = [f"{streamed.block_name(index)}.{linear}" for linear in streamed.adapter.linears]
        matrices = {layer: streamed.matrix(f"{layer}.weight") for layer in layers}
        shapes |= {layer: (W.shape[0], W.shape[1]) for layer, W in matrices.items()}
        if reference:
            reference.advance(block, index)
        for number, cell in enumerate(cells):
            for layer, W in matrices.items():
                decoded = cell.quantize(layer, W)
                if reference:
                    streamed.set_matrix(f"{layer}.weight", decoded)
            if reference:
                streams[number].advance(block, index)
    progress.finish()
    if reference is not None and windows is not None:
        _compare_predictions(streamed, windows, reference, cells, streams, progress)
    return shapes


def _compare_predictions(
    streamed: StreamedModel,
    windows: Windows,
    reference: HiddenStates,
    cells: list[Cell],
    streams: list[HiddenStates],
    progress: Progress,
) -> None:
    """Add the predictions on every window to the cells; those of the float model are computed once."""
    progress.start("compare", len(windows))
    with streamed.non_block_weights("head"):
        for number, window in enumerate(windows):
            tokens = window[None]
            expected = streamed.deferred_head(tokens, reference.batches[number])
            for cell, stream in zip(cells, streams):
                cell.metrics.add(tokens, streamed.deferred_head(tokens, stream.batches[number]), expected)
            progress.advance()
    progress.finish()


def _describe(
    cells: list[Cell], shapes: dict[str, Shape], linears: tuple[str, ...], measured: dict[str, Any] | None
) -> dict[str, Any]:
    """Return the filled table as plain data, with verdicts and the layers and kinds of layers by their errors."""
    weights = sum(rows * columns for rows, columns in shapes.values())
    results = [cell.result(weights) for cell in cells]
    for result in results:
        result["verdict"] = verdict(result)
    layers = _layer_errors(cells, shapes)
    return {
        "quantized_weights": weights,
        "measured": measured,
        "cells": results,
        "verdicts": summarize(results),
        "layers": layers,
        "kinds": _kind_errors(layers, linears),
    }


def _layer_errors(cells: list[Cell], shapes: dict[str, Shape]) -> list[dict[str, Any]]:
    """Return every layer's error relative to the mean over layers, averaged over cells; the largest first."""
    relative = dict.fromkeys(shapes, 0.0)
    for cell in cells:
        mean = sum(cell.errors.values()) / len(cell.errors)
        for layer, error in cell.errors.items():
            relative[layer] += error / max(mean, 1e-30) / len(cells)
    ordered = sorted(shapes, key=lambda layer: (-relative[layer], layer))
    return [{"name": name, "shape": list(shapes[name]), "relative_error": relative[name]} for name in ordered]


def _kind_errors(layers: list[dict[str, Any]], linears: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the mean relative error of each kind of layer over all blocks; the largest first."""
    kinds = []
    for linear in linears:
        own = [layer["relative_error"] for layer in layers if layer["name"].endswith(f".{linear}")]
        kinds.append({"name": linear, "layers": len(own), "relative_error": sum(own) / max(len(own), 1)})
    return sorted(kinds, key=lambda kind: -kind["relative_error"])
