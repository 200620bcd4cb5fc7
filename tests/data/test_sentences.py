"""An encoder reads windows between its own special tokens, and is measured on distinct sentences."""

from __future__ import annotations

import pytest
import torch

from bitmill.data.domain import SUITE, Document
from bitmill.data.sentences import SentenceWindows
from bitmill.data.windows import count_windows
from bitmill.errors import CalibrationError
from helpers import tiny_domains

CLS, SEP = 1, 2


class Words:
    """A tokenizer of whole words, numbered from 10 on as they come, between [CLS] and [SEP]."""

    def __init__(self) -> None:
        self.vocabulary: dict[str, int] = {}

    def __call__(self, text, add_special_tokens=True, truncation=False, max_length=None):
        ids = [self.vocabulary.setdefault(word, len(self.vocabulary) + 10) for word in text.split()]
        if add_special_tokens:
            ids = [CLS, *(ids[: max_length - 2] if truncation else ids), SEP]
        return {"input_ids": ids}


def sentence(number: int, words: int = 6) -> str:
    letters = "abcdefghij"
    name = letters[number // 10] + letters[number % 10]
    return f"{name} " + " ".join(f"word{name}" for _ in range(words - 2)) + " end."


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(sentence(n, 6 + n % 3) for n in range(100)))
    return path


def test_encoder_windows(file):
    windows = SentenceWindows(file, Words()).calibration(5, 16, seed=0)
    assert windows.shape == (5, 16)
    assert windows[:, 0].tolist() == [CLS] * 5
    assert windows[:, -1].tolist() == [SEP] * 5
    assert int(windows[:, 1:-1].min()) >= 10
    assert torch.equal(windows, SentenceWindows(file, Words()).calibration(5, 16, seed=0))
    with pytest.raises(CalibrationError, match="seqlen is 3, of which 2"):
        SentenceWindows(file, Words()).calibration(5, 3, seed=0)


def test_encoder_sentences(file):
    words = Words()
    held_out = SentenceWindows(file, words).held_out("eval", 32, None)
    assert 18 <= len(held_out) <= 21
    assert [len(ids) for ids in held_out] == sorted(len(ids) for ids in held_out)
    last = words(sentence(99, 6 + 99 % 3))["input_ids"]
    assert last in [ids.tolist() for ids in held_out]
    assert all(ids[0] == CLS and ids[-1] == SEP for ids in held_out)


def test_sentence_count(file):
    reading = SentenceWindows(file, Words())
    some = reading.held_out("eval", 16, 4)
    assert 64 - 16 < sum(map(len, some)) <= 64
    assert count_windows(some, 16) == 4
    whole = reading.held_out("eval", 16, 1000)
    again = reading.held_out("eval", 16, count_windows(whole, 16))
    assert [ids.tolist() for ids in whole] == [ids.tolist() for ids in again]
    assert max(map(len, reading.held_out("eval", 6, None))) == 6


def test_sentences_are_distinct(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join([*(sentence(n) for n in range(16)), *(sentence(n) for n in (0, 20, 21, 21, 22))]))
    reading = SentenceWindows(path, Words())
    assert len(reading.held_out("eval", 32, None)) == 3
    assert len(reading.held_out("all", 32, None)) == 19


def test_non_sentences_skipped(tmp_path):
    path = tmp_path / "text.txt"
    lines = [
        "A heading of some more words",
        "x = 1 + 2 * 3 / 4.",
        "Too short it is.",
        *(sentence(n) for n in range(3)),
    ]
    path.write_text("\n\n".join(lines))
    assert len(SentenceWindows(path, Words()).held_out("all", 32, None)) == 3
    with pytest.raises(CalibrationError, match=r"gives 1 of at least 3 sentences.*longer text or more windows\.$"):
        SentenceWindows(path, Words()).held_out("eval", 32, 1)


def test_encoder_windows_of_a_mixture(monkeypatch):
    names = (*SUITE, "languages")
    texts = {name: [Document(f"{n}", f"{name} {sentence(n)}") for n in range(99)] for name in names}
    tiny_domains.install(monkeypatch, texts)
    words = Words()
    reading = SentenceWindows("mix", words)
    windows = reading.calibration(24, 8, seed=0)
    assert windows.shape == (24, 8)
    assert windows[:, 0].tolist() == [CLS] * 24
    found = reading.held_out("eval", 16, 2)
    assert {int(window[1]) for window in found} == {words.vocabulary[name] for name in SUITE}
    assert reading.describe("eval") == {"part": "eval"}
    assert reading.describe("calib", 24)["domains"]["languages"] == 1
