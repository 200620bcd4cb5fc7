"""Round every layer of a model in every format of a table, to find out which of them the model tolerates.

One block is in memory at a time. Weights or, with `activations`, the inputs of each linear are rounded in every
cell of the table. With text, windows pass the blocks of every cell and of the float model, so that all cells
together need the memory of one block and their hidden states.

error   relative squared error of a layer: of its weights, sum (W - W^)^2 / sum W^2, or of its outputs
SQNR    the error in decibels, -10 log10(error): the power of the signal over that of the rounding noise
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitmill.architectures.inputs import unhook_inputs
from bitmill.calibration.walk import HiddenStates, walk_blocks
from bitmill.config.arguments import checked_arguments, renamed_arguments
from bitmill.data.text import Windows
from bitmill.data.windows import check_context_length, check_vocabulary
from bitmill.errors import UsageError
from bitmill.models.streamed import StreamedModel
from bitmill.progress import Progress, peak_memory_bytes
from bitmill.report.verdicts import summarize, verdict
from bitmill.sources.open import open_source
from bitmill.workflows.checks import check_device
from bitmill.workflows.sweep.cell import Cell
from bitmill.workflows.sweep.inputs import input_cells
from bitmill.workflows.sweep.layers import Layers, RandomInputs, TextInputs
from bitmill.workflows.sweep.weights import weight_cells

_NO_VERDICTS = (
    "no verdicts: random inputs have no outlier channels; real ones have larger errors, most per tensor and per "
    "token (calib)"
)

Shape = tuple[int, int]


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
    activations: bool = False,
    calib: str | None = None,
    device: str = "cpu",
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Round every layer of a model in every cell of the table.

    Args:
        model: name or folder of a float model, or a module.
        text: text to measure perplexity and KL divergence on; no text is read without it.
        windows: windows of the text's last fifth to measure on, and of the text for calibration.
        seqlen: tokens in a window.
        search: shrink ranges to the least squared error instead of taking the largest magnitudes.
        activations: round the inputs of layers and leave weights in float.
        calib: with activations, text whose first four fifths give the inputs of layers; without it those of
            `text`, and without both random numbers.
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
    _check_options(windows, search, activations, calib)
    check_device(device)
    progress = progress or Progress()
    progress.start("opening the model", 0)
    source = open_source(model, trust_remote_code=trust_remote_code, tokenizer=tokenizer)
    streamed = StreamedModel(source, device)
    held_out = None if text is None else _text_windows(streamed, text, windows, seqlen)
    layers = _layers(streamed, calib or text, windows, seqlen) if activations else Layers(streamed)
    cells = input_cells() if activations else weight_cells(search)
    shapes = fill_cells(streamed, cells, layers, held_out, progress)
    measured = None
    if held_out is not None:
        measured = {"text": str(text), "split": "eval", "seqlen": seqlen, "windows": len(held_out)}
        measured["reference_perplexity"] = cells[0].metrics.result()["reference_perplexity"]
    return {
        "model": source.name,
        "search": search,
        "of": cells[0].of,
        "inputs": layers.describe(),
        **_describe(cells, shapes, streamed.adapter.linears, measured, layers.are_real),
        "time_s": round(time.perf_counter() - started, 3),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _check_options(windows: int, search: bool, activations: bool, calib: str | None) -> None:
    if windows < 1:
        raise UsageError(f"windows is {windows}; use 1 or more, or leave out the text.")
    if calib is not None and not activations:
        raise UsageError("A sweep of weights reads no calibration text; leave out calib, or add activations.")
    if search and activations:
        raise UsageError("Ranges of inputs are not searched; leave out search, or activations.")


def _layers(streamed: StreamedModel, text: str | None, windows: int, seqlen: int) -> Layers:
    """Return the layers with the inputs that a text gives them, or with random ones without a text."""
    if text is None:
        return RandomInputs(streamed)
    check_context_length(streamed.source.config, seqlen)
    return TextInputs(streamed, text, windows, seqlen)


def _text_windows(streamed: StreamedModel, text_source: str, windows: int, seqlen: int) -> Windows:
    """Return held-out token windows of a text."""
    source = streamed.source
    if not streamed.task.generates:
        raise UsageError(
            f"{source.name} is {streamed.task.description}, which has no perplexity; leave out the text."
        )
    check_context_length(source.config, seqlen)
    held_out = streamed.task.windows(text_source, streamed.task.reader(source)).held_out("eval", seqlen, windows)
    check_vocabulary(source.config, held_out)
    return held_out


def fill_cells(
    streamed: StreamedModel, cells: list[Cell], layers: Layers, windows: Windows | None, progress: Progress
) -> dict[str, Shape]:
    """Round every layer in every cell.

    Args:
        streamed: the float model.
        cells: the table to fill.
        layers: supplies the layers of a block.
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
        in_block = layers.of_block(index, block)
        shapes |= {layer.name: (layer.W.shape[0], layer.W.shape[1]) for layer in in_block}
        if reference:
            reference.advance(block, index)
        for number, cell in enumerate(cells):
            for layer in in_block:
                change = cell.round(layer)
                if reference:
                    change(streamed)
            if reference:
                streams[number].advance(block, index)
        unhook_inputs(block)
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
    cells: list[Cell],
    shapes: dict[str, Shape],
    linears: tuple[str, ...],
    measured: dict[str, Any] | None,
    are_real: bool,
) -> dict[str, Any]:
    """Return the filled table as plain data, with verdicts and the layers and kinds of layers by their errors."""
    results = [cell.result() for cell in cells]
    for result in results:
        result["verdict"] = verdict(result, cells[0].of) if are_real else None
    layers = _layer_errors(cells, shapes)
    return {
        "quantized_weights": sum(rows * columns for rows, columns in shapes.values()),
        "measured": measured,
        "cells": results,
        "verdicts": summarize(results, cells[0].of) if are_real else [_NO_VERDICTS],
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
