"""Recordings with transcripts become windows of features and token ids."""

from __future__ import annotations

import json
import wave
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bitmill.data.recordings import RATE, RecordingWindows, join, split
from bitmill.errors import CalibrationError

FRAMES = 10


def processor():
    def features(sound, sampling_rate, return_tensors):
        assert sampling_rate == RATE
        return {"input_features": torch.full((1, 4, FRAMES), float(len(sound)))}

    def tokens(text):
        return {"input_ids": [ord(letter) for letter in text]}

    return SimpleNamespace(feature_extractor=features, tokenizer=tokens)


def write(path, seconds, rate=RATE):
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes(np.zeros(int(seconds * rate), dtype="<i2").tobytes())


@pytest.fixture
def recordings(tmp_path):
    lines = []
    for number in range(20):
        write(tmp_path / f"{number}.wav", 8)
        lines.append(json.dumps({"audio": f"{number}.wav", "text": f"word {number:02}"}))
    (tmp_path / "list.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return str(tmp_path / "list.jsonl")


def test_features_and_token_ids_share_a_window():
    features, ids = torch.randn(2, 4, FRAMES), torch.tensor([[1, 50257], [3, 4]])
    found = split(join(features, ids), FRAMES)
    assert torch.equal(found[0], features)
    assert torch.equal(found[1], ids)


def test_calibration_joins_recordings_up_to_thirty_seconds(recordings):
    windows = RecordingWindows(recordings, processor()).calibration(3, 100, 0)
    features, ids = split(windows, FRAMES)
    assert (features == 3 * 8 * RATE).all()  # a fourth one would be too long
    assert ids.shape == (3, 3 * 7 + 2)
    assert RecordingWindows(recordings, processor()).calibration(3, 5, 0).shape == (3, 4, FRAMES + 5)


def test_parts_are_disjoint(recordings):
    windows = RecordingWindows(recordings, processor())
    parts = [
        {bytes(split(w[None], FRAMES)[1][0].byte().tolist()) for w in windows.held_out(part, 100, None)}
        for part in ("eval", "choose", "calib", "all")
    ]
    assert sum(map(len, parts[:3])) == len(parts[3]) == 20
    assert len(windows.held_out("all", 100, 3)) == 3


@pytest.mark.parametrize("line", ["{", '{"audio": 1, "text": "a"}', '{"audio": "none.wav", "text": "a"}'])
def test_damaged_lists_are_refused(tmp_path, line):
    (tmp_path / "list.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(CalibrationError):
        RecordingWindows(str(tmp_path / "list.jsonl"), processor()).held_out("all", 10, None)


def test_other_rates_are_refused(tmp_path):
    write(tmp_path / "slow.wav", 1, 8000)
    (tmp_path / "list.jsonl").write_text('{"audio": "slow.wav", "text": "a"}', encoding="utf-8")
    with pytest.raises(CalibrationError, match="16 kHz"):
        RecordingWindows(str(tmp_path / "list.jsonl"), processor()).held_out("all", 10, None)
