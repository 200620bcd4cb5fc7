"""Requests of tasks become documents with their choices."""

from __future__ import annotations

import gzip
import json

import pytest

from bitmill.data.benchmark_tasks import BENCHMARKS, TASKS, find_tasks
from bitmill.errors import UsageError

ANIMAL = [("Which is an animal?", " ant", 0), ("Which is an animal?", " oak", 1)]
SENTENCE = [("Ann helped Bea, so Ann", " was thanked.", 0), ("Ann helped Bea, so Bea", " was thanked.", 1)]


def member(requests, label):
    """A reader of a package with one document, and a request without context behind it."""
    lines = [
        {"doc_id": 0, "idx": idx, "label": label, "request": {"context": context, "continuation": text}}
        for context, text, idx in reversed(requests)
    ]
    lines.append({"doc_id": 1_000_000, "idx": 0, "label": 0, "request": {"context": "", "continuation": " ant"}})
    content = gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode())
    return lambda name: content


@pytest.mark.parametrize(
    ("task", "requests", "label"),
    [("arc_easy", ANIMAL, 0), ("winogrande", SENTENCE, 1), ("lambada", [("He opened the", " door", 0)], ["door"])],
)
def test_documents(task, requests, label):
    (record,) = BENCHMARKS.extracts[f"task-{task}"].select(member(requests, label))
    item = TASKS[task].item(record)
    assert item.pairs == tuple((context, text) for context, text, _ in requests)
    assert item.label == (label if isinstance(label, int) else 0)


def test_calibrating_benchmarks_are_no_tasks():
    assert not {"squad", "drop", "coqa"} & set(TASKS)


@pytest.mark.parametrize("names", [[], ["arc_easy", "squad"]])
def test_unknown_names(names):
    with pytest.raises(UsageError, match=r"use some of arc_easy, "):
        find_tasks(names)


def test_each_task_once():
    assert [task.name for task in find_tasks(["piqa", "boolq", "piqa"])] == ["piqa", "boolq"]
