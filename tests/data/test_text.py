"""Text is cut into the windows of the published protocol."""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import sys
import types

import pytest
import torch

from bitmill.data.text import (
    calibration_windows,
    evaluation_windows,
    load_text,
    split_stream,
    token_stream,
    windows_hash,
)
from bitmill.errors import CalibrationError


def letters(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
    """A tokenizer of sorts."""
    logging.getLogger("transformers.tokenization_utils_base").warning("Token indices sequence length is longer")
    return {"input_ids": [ord(c) for c in text]}


def refused(function, *args) -> str:
    with pytest.raises(CalibrationError) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_pydoc_text():
    from pydoc_data.topics import topics

    text = load_text("pydoc")
    assert text.startswith(topics[min(topics)])
    assert text.endswith(topics[max(topics)])


def test_text_and_json_lines(tmp_path):
    plain, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text("grün\n", encoding="utf-8")
    lines.write_text('{"text": "a\u2028b"}\n\n{"text": "c", "id": 1}\n', encoding="utf-8")
    assert load_text(str(plain)) == "grün\n"
    assert load_text(lines) == "a\u2028b\n\nc"


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("{nope", "no valid JSON"),
        ("[1]", "no text in a field"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"txt": "a"}', "no text"),
        ('{"text": 3}', "no text"),
    ],
)
def test_bad_json_line_number(tmp_path, line, fragment):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n')
    message = refused(load_text, path)
    assert "Line 2 of" in message
    assert fragment in message


def test_unusable_files(tmp_path):
    assert "nowhere.txt; give 'pydoc'" in refused(load_text, "nowhere.txt")
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc\xff")
    assert "byte 3 is 0xff" in refused(load_text, path)
    path.write_text(" \n")
    assert "holds no text" in refused(load_text, path)
    assert "no regular file" in refused(load_text, tmp_path)
    os.mkfifo(tmp_path / "pipe.txt")
    assert "no regular file" in refused(load_text, tmp_path / "pipe.txt")
    path.write_text("a" * 7 + "\ud800", encoding="utf-8", errors="surrogatepass")
    assert "byte 7 is 0xed" in refused(load_text, path)
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "a\\ud800b"}')
    assert r"half a surrogate pair, \ud800, at character 1" in refused(load_text, lines)


def test_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_text("one two", encoding="utf-8-sig")
    (tmp_path / "a.jsonl").write_text('{"text": "one two"}', encoding="utf-8-sig")
    assert load_text(tmp_path / "a.txt") == load_text(tmp_path / "a.jsonl") == "one two"


def test_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("one")
    assert load_text("~/a.txt") == "one"


def test_local_folder_is_not_the_hub(tmp_path, monkeypatch):
    """`datasets` would read it, and run a script that it holds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    assert "also a local path" in refused(load_text, "hf:corpus")


def test_hub_dataset_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refused(load_text, "hf:org/data")
    assert "names no Hub dataset" in refused(load_text, "hf:a:b:c:d")


def test_hub_dataset_limit(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return ({"text": letter * 4} for letter in "abcdef")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr("bitmill.data.text.HUB_CHARACTERS", 7)
    assert load_text("hf:org/data") == "aaaa\n\nbbbb"
    load_text("hf:org/data:en:validation")
    assert asked[0] == (("org/data", None), {"split": "train", "streaming": True})
    assert asked[1] == (("org/data", "en"), {"split": "validation", "streaming": True})


def test_hub_failure_message(monkeypatch):
    def no_field(*_, **__):
        return [{"body": "x"}]

    def no_network(*_, **__):
        raise ConnectionError("no\nroute")

    for load, fragment in ((no_field, "no field 'text'"), (no_network, "could not be read (no route)")):
        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
        assert fragment in refused(load_text, "hf:org/data")


def test_stream_is_silent(tmp_path, caplog):
    path = tmp_path / "a.txt"
    path.write_text("abc")
    assert token_stream(path, letters).tolist() == [97, 98, 99]
    assert not caplog.records


def test_calibration_split():
    ids = torch.arange(11)
    assert split_stream(ids, "calib").tolist() == list(range(8))
    assert split_stream(ids, "eval").tolist() == [8, 9, 10]
    assert split_stream(ids, "all") is ids
    assert "'test'" in refused(split_stream, ids, "test")


def test_calibration_windows():
    ids = torch.arange(1000)
    starts = torch.randint(0, 1000 - 16, (5,), generator=torch.Generator().manual_seed(3))
    windows = calibration_windows(ids, 5, 16, seed=3)
    assert torch.equal(windows, torch.stack([ids[s : s + 16] for s in starts]))
    assert not torch.equal(windows, calibration_windows(ids, 5, 16, seed=4))


def test_evaluation_windows():
    ids = torch.arange(50)
    assert torch.equal(evaluation_windows(ids, 16), ids[:48].view(3, 16))
    assert torch.equal(evaluation_windows(ids, 16, 2), ids[:32].view(2, 16))
    assert len(evaluation_windows(ids, 16, 40)) == 3


def test_short_text_message():
    assert "has 16 tokens and a window needs more than 16" in refused(calibration_windows, torch.arange(16), 1, 16)
    assert "has 15 tokens, fewer than one window of 16" in refused(evaluation_windows, torch.arange(15), 16)
    assert "samples is 0" in refused(calibration_windows, torch.arange(99), 0, 16)
    assert "windows is -1" in refused(evaluation_windows, torch.arange(99), 16, -1)


def test_hash_of_int64_bytes():
    windows = torch.tensor([[1, 2], [3, 70000]])
    expected = hashlib.sha256(struct.pack("<4q", 1, 2, 3, 70000)).hexdigest()
    assert windows_hash(windows) == windows_hash(windows.int()) == expected
    assert windows_hash(windows.T) != expected
