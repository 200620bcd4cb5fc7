"""Documents are divided by article, story or file, always alike, and what a task asks about never calibrates."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest

from bitmill.data.domain import DOMAINS, PARTS, SUITE, Document, domain_documents, grouped
from bitmill.errors import CalibrationError
from helpers import tiny_domains


def split(monkeypatch, documents):
    tiny_domains.install(monkeypatch, {"prose": documents})
    return {part: domain_documents("prose", part) for part in PARTS}


def test_parts_are_60_20_and_20_percent_and_do_not_depend_on_other_documents(monkeypatch):
    documents = [Document(f"story {n}", f"{n}") for n in range(1000)]
    parts = split(monkeypatch, documents)
    assert [round(len(parts[part]), -2) for part in PARTS] == [600, 200, 200]
    assert sorted(domain_documents("prose", "all")) == sorted(d.text for d in documents)
    fewer = split(monkeypatch, documents[::7])
    assert all(set(fewer[part]) <= set(parts[part]) for part in PARTS)


def test_a_story_is_in_one_part(monkeypatch):
    parts = split(monkeypatch, [Document(f"story {n % 40}", f"{n % 40}") for n in range(200)])
    assert sum((Counter(set(texts)) for texts in parts.values()), Counter()) == Counter(map(str, range(40)))


def test_text_of_a_task_is_only_measured_on(monkeypatch):
    documents = [
        Document(f"story {n}", f"{n} {held_out}", held_out=held_out) for n in range(9) for held_out in (0, 1)
    ]
    tiny_domains.install(monkeypatch, {"prose": documents})
    assert len(domain_documents("prose", "eval")) == 18
    with pytest.raises(CalibrationError, match="'prose' has no part 'calib'; it is only for measuring"):
        domain_documents("prose", "calib")
    with pytest.raises(CalibrationError, match="no part 'test' of a text; choose one of calib, choose, eval, all"):
        domain_documents("prose", "test")


def test_a_conversation_is_written_in_the_chat_template_where_there_is_one(monkeypatch):
    turns = (("user", "Who?"), ("assistant", "I."))
    tiny_domains.install(monkeypatch, {"dialogue": [Document("a", "User: Who?\nAssistant: I.", turns)]})
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]
    chat = SimpleNamespace(chat_template="...", apply_chat_template=lambda given, tokenize: (given, tokenize))
    assert domain_documents("dialogue", "all", chat) == [(messages, False)]
    assert domain_documents("dialogue", "all") == ["User: Who?\nAssistant: I."]
    base = SimpleNamespace(chat_template=None)
    assert domain_documents("dialogue", "all", base) == ["User: Who?\nAssistant: I."]


def test_texts_that_share_a_paragraph_are_one_group():
    shared = ["x" * 100, "y" * 100]
    texts = {"a": shared[0], "b": f"b\n\n{shared[0]}\n\n{shared[1]}", "c": shared[1], "d": "x" * 99, "e": "x" * 99}
    found = grouped(texts)
    assert found["a"] == found["b"] == found["c"]
    assert len({found["a"], found["d"], found["e"]}) == 3


def test_every_domain_says_where_it_comes_from_and_under_which_licence():
    assert set(SUITE) < set(DOMAINS.names())
    for _, kind in DOMAINS.items():
        assert all((kind.description, kind.origin, kind.licence))


def test_documentation_needs_no_download():
    documents = DOMAINS.get("documentation").documents()
    parts = [set(domain_documents("documentation", part)) for part in PARTS]
    assert sum(map(len, parts)) == len({d.text for d in documents})
    assert all(parts)
