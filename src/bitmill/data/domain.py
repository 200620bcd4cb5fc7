"""Texts by domain: documents of one kind, split once by article, story or file into three parts.

A domain is a class in `bitmill/data/domains/`, found by its registered name. Its documents come from packages,
which are pinned, or from the standard library of the running Python, which differs between its releases.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from bitmill.config.registry import Registry
from bitmill.errors import CalibrationError

SUITE = ("documentation", "prose", "encyclopedia", "dialogue", "code")  # held-out domains, in this order
PARTS = ("calib", "choose", "eval")
_TENTHS = (6, 8, 10)  # of the identities, up to and with each part: 60 %, 20 % and 20 %


@dataclass(frozen=True)
class Document:
    """An article, story, conversation or source file.

    identity: the article, story or file; all documents that share one are in one part.
    text: its text; of a conversation, the text for models without a chat template.
    turns: (role, content) of a conversation, with the roles "user" and "assistant".
    held_out: only to be measured on, for example because a task asks questions about it.
    """

    identity: str
    text: str
    turns: tuple[tuple[str, str], ...] = ()
    held_out: bool = False


class Domain(ABC):
    """A kind of text.

    description: the kind in a few words.
    origin: packages that the text comes from.
    licence: licences of the texts.
    """

    description: ClassVar[str]
    origin: ClassVar[str]
    licence: ClassVar[str]

    @classmethod
    @abstractmethod
    def documents(cls) -> list[Document]:
        """Return all documents, in an order that does not change.

        Raises:
            SourceError: A package cannot be downloaded.
            CalibrationError: This Python comes without the text.
        """


DOMAINS: Registry[type[Domain]] = Registry("text", "bitmill.data.domains")


def domain_documents(name: str, part: str, tokenizer: Any = None) -> list[str]:
    """Return the documents of one part of a domain, in an order that mixes their origins.

    Args:
        name: of a registered domain.
        part: "calib", "choose", "eval" or "all".
        tokenizer: conversations are written in its chat template, if it has one, otherwise as plain text.

    Raises:
        CalibrationError: There is no such part, or it is empty.
    """
    if part not in (*PARTS, "all"):
        raise CalibrationError(f"There is no part {part!r} of a text; choose one of {', '.join(PARTS)}, all.")
    parts = _split(name)
    chosen = [document for other in PARTS for document in parts[other]] if part == "all" else parts[part]
    if not chosen:
        raise CalibrationError(f"The text {name!r} has no part {part!r}; it is only for measuring.")
    return [_render(document, tokenizer) for document in chosen]


@lru_cache
def _split(name: str) -> dict[str, list[Document]]:
    """Return the documents of a domain by part, sorted by the hash of their identity."""
    documents = DOMAINS.get(name).documents()
    held_out = {document.identity for document in documents if document.held_out}
    parts: dict[str, list[Document]] = {part: [] for part in PARTS}
    for document in sorted(documents, key=lambda d: _hash(d.identity)):
        parts["eval" if document.identity in held_out else _part(document.identity)].append(document)
    return parts


def _part(identity: str) -> str:
    """Return the part of an identity, which depends on nothing else."""
    tenth = _hash(identity) % 10
    return next(part for part, end in zip(PARTS, _TENTHS, strict=True) if tenth < end)


def _hash(identity: str) -> int:
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big")


def _render(document: Document, tokenizer: Any) -> str:
    """Return the text of a document, a conversation in the chat template of the tokenizer."""
    if not document.turns or not getattr(tokenizer, "chat_template", None):
        return document.text
    messages = [{"role": role, "content": content} for role, content in document.turns]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    return text


def grouped(texts: dict[str, str], shortest: int = 100) -> dict[str, str]:
    """Return an identity for every text, equal for texts that share a paragraph.

    Args:
        texts: name -> text.
        shortest: characters of a paragraph below which sharing it means nothing.
    """
    owner: dict[str, str] = {}  # name -> another text of its group; the first one owns itself
    seen: dict[str, str] = {}

    def first(name: str) -> str:
        while owner[name] != name:
            name = owner[name]
        return name

    for name, text in texts.items():
        owner[name] = name
        for paragraph in _paragraphs(text, shortest):
            owner[first(name)] = first(seen.setdefault(paragraph, name))
    return {name: first(name) for name in texts}


def _paragraphs(text: str, shortest: int) -> Iterator[str]:
    for block in text.split("\n\n"):
        paragraph = " ".join(block.split())
        if len(paragraph) >= shortest:
            yield paragraph
