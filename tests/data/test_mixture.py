"""Windows of a mixture are shared out in proportion, to the last one."""

from __future__ import annotations

import pytest

from bitmill.data.domain import SUITE, Document
from bitmill.data.mixture import MIX, apportion, is_domain, shares
from bitmill.data.text import load_documents, load_text
from helpers import tiny_domains


@pytest.mark.parametrize(
    ("windows", "expected"),
    [(0, [0, 0, 0]), (1, [1, 0, 0]), (2, [1, 1, 0]), (6, [3, 2, 1]), (8, [4, 3, 1]), (128, [64, 43, 21])],
)
def test_largest_remainders_get_the_rest(windows, expected):
    assert list(apportion(windows, {"a": 3, "b": 2, "c": 1}).values()) == expected


def test_names():
    assert all(map(is_domain, ("mix", "suite", "brown", *SUITE)))
    assert not any(map(is_domain, ("pydoc", "self", "text.txt", ["mix"])))
    assert shares("mix", "calib") == MIX
    assert shares("mix", "eval") == shares("suite", "eval") == dict.fromkeys(SUITE, 1)
    assert shares("prose", "eval") == {"prose": 1}


def test_a_mixture_is_a_text_like_any_other(monkeypatch, tmp_path):
    tiny_domains.install(monkeypatch, {name: [Document(name, name)] for name in SUITE})
    assert load_text("suite") == "\n\n".join(SUITE)
    assert load_documents("suite") == list(SUITE)
    (tmp_path / "a.txt").write_text("0123456789")
    assert load_documents(tmp_path / "a.txt", "eval") == ["89"]
