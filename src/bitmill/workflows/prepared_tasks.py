"""Benchmark tasks with their documents, ready to be asked of models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bitmill.data.benchmark_tasks import BenchmarkTask, Item, LikelihoodTask, find_tasks, load_items
from bitmill.data.generated_tasks import GeneratedTask, Question
from bitmill.errors import UsageError
from bitmill.evaluation.generated_answers import answer, share_figures
from bitmill.evaluation.likelihood import figures
from bitmill.evaluation.prompt_cache import PromptCache
from bitmill.evaluation.sandbox import Sandbox
from bitmill.integrations.lm_eval import log_likelihoods, require_lm_eval
from bitmill.pipeline.in_place import eval_mode
from bitmill.progress import Progress
from bitmill.workflows.kv import can_continue_cache

LIMIT = 200  # documents of a task
BATCH_SIZE = 8  # continuations that run together


def check_tasks(names: Sequence[str], run_code: bool) -> list[BenchmarkTask]:
    """Return the tasks of these names, before anything takes time.

    Raises:
        UsageError: a task does not exist, runs programs without `run_code`, or needs lm-eval, which is missing.
    """
    chosen = find_tasks(list(names))
    programs = [task.name for task in chosen if isinstance(task, GeneratedTask) and task.runs_code]
    if programs and not run_code:
        raise UsageError(
            f"{' and '.join(programs)} would run programs that the model writes; allow that with --run-code "
            "(run_code=True), see docs/tasks.md for what their sandbox protects."
        )
    if any(isinstance(task, LikelihoodTask) for task in chosen):
        require_lm_eval()
    return chosen


def prepare_tasks(names: Sequence[str], limit: int | None, run_code: bool) -> PreparedTasks:
    """Read the documents of tasks, and try the sandbox where they run programs.

    Args:
        names: of the tasks.
        limit: first documents of each; None for all.
        run_code: allow programs to run.

    Raises:
        UsageError: as `check_tasks`, or programs cannot be run here.
        SourceError: the package cannot be downloaded.
    """
    chosen = check_tasks(names, run_code)
    runs_code = any(isinstance(task, GeneratedTask) and task.runs_code for task in chosen)
    sandbox = Sandbox() if runs_code else None
    return PreparedTasks({task: load_items(task, limit) for task in chosen}, sandbox)


@dataclass(frozen=True)
class PreparedTasks:
    """Tasks with their documents, and the sandbox of their programs."""

    documents: dict[BenchmarkTask, list[Any]]
    sandbox: Sandbox | None

    @property
    def unprotected(self) -> tuple[str, ...]:
        """What the sandbox does not keep programs from."""
        return self.sandbox.unprotected if self.sandbox else ()

    @torch.no_grad()
    def measure(
        self, model: nn.Module, tokenizer: Any, progress: Progress, batch_size: int = BATCH_SIZE, title: str = ""
    ) -> dict[str, dict[str, Any]]:
        """Return name of a task -> `documents` and its figures.

        Args:
            model: a language model.
            tokenizer: its tokenizer.
            progress: is given a task for each of them.
            batch_size: continuations that run together.
            title: in front of the names of these tasks.
        """
        measured = {}
        with eval_mode(model):
            for task, documents in self.documents.items():
                named = f"{title} {task.name}".strip()
                if isinstance(task, GeneratedTask):
                    progress.start(named, len(documents))
                    found = self._judge(model, tokenizer, task, documents, progress)
                else:
                    progress.start(named, sum(len(item.pairs) for item in documents))
                    found = _score(model, tokenizer, task, documents, batch_size, progress)
                measured[task.name] = {"documents": len(documents), **found}
        return measured

    def _judge(
        self, model: nn.Module, tokenizer: Any, task: GeneratedTask, questions: list[Question], progress: Progress
    ) -> dict[str, Any]:
        """Return the share of right answers of a task that the model writes."""
        passes = self.sandbox.passes if self.sandbox else None
        prompt_cache = PromptCache(lambda: None, can_continue_cache(model))
        right = []
        for question in questions:
            text = answer(
                model, tokenizer, question.prompt, task.stop_sequences, task.max_new_tokens, prompt_cache
            )
            right.append(question.is_right(text, passes))
            progress.advance()
        return share_figures(task.metric, right)


def _score(
    model: nn.Module,
    tokenizer: Any,
    task: LikelihoodTask,
    items: list[Item],
    batch_size: int,
    progress: Progress,
) -> dict[str, float | None]:
    """Return the figures of a task whose answers are scored by their likelihood."""
    pairs = [pair for item in items for pair in item.pairs]
    scores = iter(log_likelihoods(model, tokenizer, pairs, batch_size, lambda: progress.advance(1)))
    scored = [[next(scores) for _ in item.pairs] for item in items]
    continuations = [[continuation for _, continuation in item.pairs] for item in items]
    return figures(task.metrics, scored, continuations, [item.label for item in items])
