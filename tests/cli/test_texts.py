"""bitmill texts lists texts without a download, and shows the parts of one."""

from __future__ import annotations

import json

from bitmill.cli.main import main
from bitmill.data.domain import DOMAINS, Document
from helpers import tiny_domains


def test_listing(capsys):
    assert main(["texts", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["texts"]] == DOMAINS.names()
    assert sum(row["share_of_mix"] for row in found["texts"]) == 1
    assert main(["texts"]) == 0
    assert "PSF-2.0" in capsys.readouterr().out


def test_parts(capsys, monkeypatch):
    tiny_domains.install(monkeypatch, {"german": [Document("a", "abc", held_out=True)]})
    assert main(["texts", "german"]) == 0
    assert "1 documents, 3 characters" in capsys.readouterr().out
    assert main(["texts", "nowhere"]) == 2
    assert "There is no text 'nowhere'; choose one of: mix, suite," in capsys.readouterr().err
