"""A decoder reads windows of a stream; an encoder reads sentences, and windows between its own tokens."""

from __future__ import annotations

import pytest
import torch

import bitmill
from bitmill.data import text
from bitmill.data.domain import SUITE, Document
from bitmill.data.windows import CalibrationData, SentenceWindows, StreamWindows, count_windows
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


def letters(text, add_special_tokens=True):
    return {"input_ids": [ord(c) for c in text]}


def test_decoder_windows(file):
    ids = text.token_stream(file, letters)
    reading = StreamWindows(file, letters)
    calib = text.calibration_windows(text.split_stream(ids, "calib"), 3, 16, 5)
    assert torch.equal(reading.calibration(3, 16, 5), calib)
    held_out = reading.held_out("eval", 16, 4)
    assert torch.equal(held_out, text.evaluation_windows(text.split_stream(ids, "eval"), 16, 4))
    assert count_windows(held_out, 16) == 4


def test_every_window_of_a_decoder_starts_with_the_prefix_of_its_tokenizer(file):
    def tokenizer(text, add_special_tokens=True):
        return {"input_ids": [7, 8] * add_special_tokens + letters(text)["input_ids"]}

    windows, plain = StreamWindows(file, tokenizer), StreamWindows(file, letters)
    assert (windows.prefix, plain.prefix) == ((7, 8), ())
    for found, expected in [
        (windows.calibration(3, 16, 5), plain.calibration(3, 14, 5)),
        (windows.held_out("eval", 16, 4), plain.held_out("eval", 14, 4)),
    ]:
        assert found[:, :2].tolist() == [[7, 8]] * len(expected)
        assert torch.equal(found[:, 2:], expected)
    with pytest.raises(CalibrationError, match="seqlen is 3, of which 2 are special tokens; use at least 4"):
        windows.held_out("eval", 3, 1)


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


def test_hash_depends_on_lengths():
    one, other = [torch.tensor([1, 2]), torch.tensor([3])], [torch.tensor([1]), torch.tensor([2, 3])]
    assert text.windows_hash(one) != text.windows_hash(other)
    assert text.windows_hash(one) == text.windows_hash([ids.clone() for ids in one])


def test_old_name_of_calibration_data_warns():
    with pytest.warns(FutureWarning, match=r"bitmill\.CalibrationData"):
        assert getattr(bitmill, "Calibration") is CalibrationData  # noqa: B009


def test_encoder_windows_of_a_mixture(monkeypatch):
    names = (*SUITE, "languages")
    texts = {name: [Document(f"{n}", f"{name} {sentence(n)}") for n in range(99)] for name in names}
    tiny_domains.install(monkeypatch, texts)
    words = Words()
    reading = SentenceWindows("mix", words)
    windows = reading.calibration(24, 8, seed=0)
    assert windows.shape == (24, 8)
    assert windows[:, 0].tolist() == [CLS] * 24
    found = reading.held_out("eval", 16, 10)
    assert {int(window[1]) for window in found} == {words.vocabulary[name] for name in SUITE}
    assert reading.describe("eval", 10) == {"part": "eval", "domains": dict.fromkeys(SUITE, 2)}
