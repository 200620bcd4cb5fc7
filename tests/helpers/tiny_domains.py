"""Small domains in place of those that are downloaded."""

from __future__ import annotations

from functools import lru_cache

import pytest

from bitmill.data import domain
from bitmill.data.domain import DOMAINS, Document, Domain


class Letters:
    """A tokenizer of characters with an end-of-text token, and with a prefix where one is given."""

    all_special_tokens: tuple[str, ...] = ("<eos>",)
    eos_token_id: int | None = 2
    chat_template = None

    def __init__(self, prefix=()):
        self.prefix = list(prefix)

    def __call__(self, text, add_special_tokens=True, truncation=False, max_length=None):
        return {"input_ids": (self.prefix if add_special_tokens else []) + [ord(c) for c in text]}

    def convert_tokens_to_ids(self, token):
        assert token == "<|endoftext|>"
        return 0


def tiny_domain(name: str, documents: list[Document]) -> type[Domain]:
    kind = {"description": "tiny", "origin": "here", "licence": "none"}
    return type(name, (Domain,), {**kind, "documents": classmethod(lambda cls: documents)})


def install(monkeypatch: pytest.MonkeyPatch, domains: dict[str, list[Document]]) -> None:
    """Let these domains take the place of those with their names."""
    DOMAINS.names()
    for name, documents in domains.items():
        monkeypatch.setitem(DOMAINS._members, name, tiny_domain(name, documents))
    monkeypatch.setattr(domain, "_split", lru_cache(domain._split.__wrapped__))
