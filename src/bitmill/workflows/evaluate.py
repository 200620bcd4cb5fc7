"""Measure a model on held-out text."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from bitmill.checkpoint.reader import is_checkpoint, open_checkpoint
from bitmill.data.windows import check_context_length, count_windows
from bitmill.errors import UsageError
from bitmill.evaluation.metrics import score_windows
from bitmill.kv.config import FLOAT, SAMPLES, parse_kv_config
from bitmill.models.block_call import output_fn
from bitmill.pipeline.in_place import eval_mode
from bitmill.progress import Progress, peak_memory_bytes
from bitmill.sources.open import open_source
from bitmill.sources.pooling import read_pooling
from bitmill.tasks.base import Task, task_for, task_of
from bitmill.workflows import kv as kv_workflow
from bitmill.workflows.load import live_model, load_tokenizer
from bitmill.workflows.quantize import SECONDS_DIGITS
from bitmill.workflows.sizes import stored_bits

_TOKENS = 1024  # through a packed cache at a time


def evaluate(
    model: str | Path | nn.Module,
    *,
    text_source: str = "pydoc",
    split: Literal["eval", "calib", "all"] = "eval",
    seqlen: int = 512,
    windows: int | None = 40,
    reference: str | Path | nn.Module | None = None,
    kv: str | None = None,
    kv_bits: int | None = None,
    kv_options: dict[str, Any] | None = None,
    kv_samples: int = SAMPLES,
    kv_seqlen: int | None = None,
    tokenizer: Any = None,
    device: str = "cpu",
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Perplexity on non-overlapping windows; with `reference`, KL divergence and top-1 agreement to it.

    An encoder is measured on the sentences in as much text, see `bitmill.evaluation.embedding`: pair_cosine, and
    with a reference cosine_similarity and neighbour_agreement.

    kv: a KV method, to measure through the packed cache; the reference keeps an ordinary one. What kv_bits and
        kv_options leave out is as in the model's folder, if that is calibrated for the method. A method that needs
        a calibration and finds none there is calibrated first, on `kv_samples` windows of `kv_seqlen` tokens
        (2048, or as many as the model reads) of the text's first four fifths.

    Returns plain data: perplexity, tokens, bits_per_weight, size_bytes, time_s, peak_memory_bytes, and with a
    reference kl_divergence (nats a token), top1_agreement and reference_perplexity; with a KV method kv_method,
    kv_options, kv_calibration, kv_bits_per_element (allocated bits), kv_bytes (of one window) and
    kv_table_bytes (calibrated tables, in neither of the two), and kv_on_calibration_text.
    """
    started = time.perf_counter()
    chosen_kv = None if kv == FLOAT else kv
    kv_config = parse_kv_config(chosen_kv, kv_bits, kv_options, kv_samples, kv_seqlen)
    if tokenizer is None:
        if isinstance(model, nn.Module):
            raise UsageError("A live model carries no tokenizer; pass tokenizer=... beside it.")
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    progress = progress or Progress()
    progress.start("reading text and model", 0)
    bits, size = stored_bits(model, trust_remote_code)
    task = _task(model, trust_remote_code)
    metric = task.metric()  # a pooling that is not supported is refused before text is read
    text_windows = task.windows(text_source, tokenizer)
    chosen = text_windows.held_out(split, seqlen, windows)
    live = live_model(model, device, trust_remote_code)
    other = None if reference is None else live_model(reference, device, trust_remote_code)
    check_context_length(getattr(live, "config", None), seqlen)
    against = None if other is None else output_fn(other)
    answers, batch = output_fn(live), task.batch_size
    with eval_mode(live), eval_mode(other):
        packed = (
            kv_workflow.PackedCacheEvaluator(live, kv_config, text_windows, text_source, split, progress)
            if kv_config is not None
            else None
        )
        if packed:
            answers, batch = packed, max(1, _TOKENS // seqlen)
        result = score_windows(answers, chosen, against, progress, batch, metric)
    return {
        **result,
        **(packed.measurements() if packed else {}),
        "bits_per_weight": bits,
        "size_bytes": size,
        "text": text_source,
        "split": split,
        "seqlen": seqlen,
        "windows": count_windows(chosen, seqlen),
        "time_s": round(time.perf_counter() - started, SECONDS_DIGITS),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _task(model: str | Path | nn.Module, trust_remote_code: bool) -> Task:
    """Return the task of a live model, a folder that bitmill wrote, or any other source."""
    if isinstance(model, nn.Module):
        return task_for(getattr(model, "config", None))
    if is_checkpoint(Path(model)):
        return task_for(open_checkpoint(model).config, partial(read_pooling, Path(model)))
    return task_of(open_source(model, trust_remote_code=trust_remote_code))
