"""Documents are packed with the separator that the model knows, and windows of a mixture come from its domains."""

from __future__ import annotations

import pytest
import torch

from bitmill.data.domain import SUITE, Document
from bitmill.data.mixture import MIX, apportion
from bitmill.data.packed import DocumentWindows, text_windows
from bitmill.data.windows import StreamWindows
from helpers import tiny_domains
from helpers.tiny_domains import Letters


@pytest.fixture
def domains(monkeypatch):
    """Every domain in letters of its own."""
    letters = dict(zip((*SUITE, "languages"), "abcdef", strict=True))
    documents = {name: [Document(f"{n}", letter * 20) for n in range(40)] for name, letter in letters.items()}
    tiny_domains.install(monkeypatch, documents)
    return letters


@pytest.mark.parametrize(
    ("special", "eos", "prefix", "separator", "packed"),
    [
        (("<eos>",), 2, (), (2,), [97, 2, 97, 2]),
        (("<eos>", "<|endoftext|>"), 2, (), (0,), [97, 0, 97, 0]),
        (("<bos>", "<|endoftext|>"), 2, (5,), (5,), [5, 97, 5, 97]),
        ((), None, (), (10, 10), [97, 10, 10, 97, 10, 10]),
    ],
)
def test_separators(monkeypatch, special, eos, prefix, separator, packed):
    tiny_domains.install(monkeypatch, {"prose": [Document(f"{n}", "a") for n in range(2)]})
    tokenizer = Letters(prefix)
    tokenizer.all_special_tokens, tokenizer.eos_token_id = special, eos
    windows = DocumentWindows("prose", tokenizer)
    assert (windows.prefix, windows.separator) == (prefix, separator)
    assert windows._packed("prose", "all").tolist() == packed


def test_a_prefix_that_the_chat_template_writes_is_not_doubled(monkeypatch):
    tiny_domains.install(monkeypatch, {"prose": [Document("0", "\x05a")]})
    assert DocumentWindows("prose", Letters((5,)))._packed("prose", "all").tolist() == [5, 97]


def test_windows_of_a_mixture(domains):
    reading = text_windows("mix", Letters())
    windows = reading.calibration(48, 16, seed=3)
    assert windows.shape == (48, 16)
    assert torch.equal(windows, text_windows("mix", Letters()).calibration(48, 16, seed=3))
    assert not torch.equal(windows, reading.calibration(48, 16, seed=4))
    counts = apportion(48, MIX)
    letters = [chr(int(window.max())) for window in windows]
    assert {name: letters.count(letter) for name, letter in domains.items()} == counts
    assert letters != sorted(letters)  # any first few windows are a mixture too
    assert reading.describe("calib", 48) == {"part": "calib", "domains": counts, "separator": [2]}

    held_out = reading.held_out("eval", 16, 2)
    assert "".join(chr(int(window.max())) for window in held_out) == "aabbccddee"
    assert reading.domains("eval", 16, 2) == dict.fromkeys(SUITE, 2)
    assert reading.describe("eval") == {"part": "eval", "separator": [2]}
    short = reading.domains("eval", 16, 1000)
    assert 2 < min(short.values()) < 1000
    assert sum(short.values()) == len(reading.held_out("eval", 16, None))
    assert text_windows("prose", Letters()).domains("eval", 16, 2) == {}
    assert len(text_windows("suite", Letters()).held_out("eval", 16, None)) > 5


def test_windows_start_with_the_prefix(domains):
    reading = text_windows("prose", Letters((5,)))
    for windows in (reading.calibration(4, 16, 0), reading.held_out("choose", 16, 2)):
        assert windows.shape[1] == 16
        assert windows[:, 0].tolist() == [5] * len(windows)


def test_other_texts_are_one_stream():
    reading = text_windows(["some text " * 20], Letters())
    assert isinstance(reading, StreamWindows)
    assert reading.describe("calib", 4) == {}
