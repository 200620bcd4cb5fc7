"""A decoder reads windows of one stream, each behind the prefix of its tokenizer."""

from __future__ import annotations

import pytest
import torch

import bitmill
from bitmill.data import text
from bitmill.data.windows import CalibrationData, StreamWindows, count_windows
from bitmill.errors import CalibrationError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(map(str, range(400))))
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


def test_hash_depends_on_lengths():
    one, other = [torch.tensor([1, 2]), torch.tensor([3])], [torch.tensor([1]), torch.tensor([2, 3])]
    assert text.windows_hash(one) != text.windows_hash(other)
    assert text.windows_hash(one) == text.windows_hash([ids.clone() for ids in one])


def test_old_name_of_calibration_data_warns():
    with pytest.warns(FutureWarning, match=r"bitmill\.CalibrationData"):
        assert getattr(bitmill, "Calibration") is CalibrationData  # noqa: B009
