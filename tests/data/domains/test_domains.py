"""Each domain makes documents of what its package holds."""

from __future__ import annotations

import pytest

from bitmill.data import archive
from bitmill.data.domain import DOMAINS, Document
from bitmill.data.domains import code
from bitmill.data.domains.brown import _sentence
from bitmill.data.domains.languages import UDHR

STORY = {"id": "1", "source": "cnn", "text": "News.", "turns": [["What?", "News"], ["Why?", "So"]]}
RECORDS = {
    "conversations": [STORY, {**STORY, "id": "2", "source": "gutenberg"}],
    "novels": [{"id": 0, "text": "A novel"}],
    "moby-dick": [{"id": "1", "text": "Call me Ishmael."}],
    "articles": [{"task": "boolq", "id": "Ant", "text": "Ants"}, {"task": "drop", "id": "Bee", "text": "Bees"}],
    "programs": [{"id": 11, "text": "pass"}],
}


@pytest.fixture(autouse=True)
def records(monkeypatch):
    monkeypatch.setattr(archive.Archive, "records", lambda self, name: RECORDS[name])


def documents(name):
    return DOMAINS.get(name).documents()


def test_prose():
    assert documents("prose") == [
        Document("coqa:2", "News."),
        Document("novel:Moby-Dick", "Call me Ishmael."),
        Document("lambada:0", "A novel", held_out=True),
    ]


def test_encyclopedia():
    assert documents("encyclopedia") == [Document("Ant", "Ants", held_out=True), Document("Bee", "Bees")]


def test_dialogue():
    turns = (("user", "News.\n\nWhat?"), ("assistant", "News"), ("user", "Why?"), ("assistant", "So"))
    plain = "User: News.\n\nWhat?\nAssistant: News\nUser: Why?\nAssistant: So"
    assert documents("dialogue") == [Document("coqa:1", plain, turns)]


def test_code(tmp_path, monkeypatch):
    good = "value = 1\n" * 200
    files = {"b.py": good, "a/c.py": good, "a/small.py": "pass", "table.py": "x" * 2000, "test_b.py": good}
    for name, text in {**files, "site-packages/d.py": good, "a/tests/e.py": good}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(code.sysconfig, "get_path", lambda name: str(tmp_path))
    files = [Document("stdlib:a/c.py", good), Document("stdlib:b.py", good)]
    assert documents("code") == [*files, Document("mbpp:11", "pass", held_out=True)]
    monkeypatch.setattr(code.sysconfig, "get_path", lambda name: str(tmp_path / "nowhere"))
    with pytest.raises(code.CalibrationError, match="came without sources"):
        documents("code")


def test_words_of_brown_lose_their_tags():
    line = "\tThe/at jury/nn said/vbd ``/`` no/at ''/'' (/( yes/rb )/) ;/. and/or/cc and/cc ./."
    assert _sentence(line) == 'The jury said "no" (yes); and/or and.'


def test_declarations():
    page = "<body><h1>Erkl&auml;rung</h1>" + "<article><h2>Artikel</h2><p>Alle\n <b>Menschen</b></p></article>" * 5
    found = list(UDHR.extracts["german"].select(lambda name: page.encode()))
    assert [r["id"] for r in found] == ["0", "5"]
    assert found[0]["text"].startswith("Erklärung\n\nArtikel\nAlle Menschen\n\nArtikel")
