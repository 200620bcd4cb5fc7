"""Recordings with transcripts as an encoder-decoder of speech reads them.

A source is a .jsonl file whose lines have an `audio`, the path of a WAV file beside it, and its `text`. The path
alone decides which part a line belongs to: a fifth is measured on ("eval"), a fifth is for choices ("choose"),
three fifths calibrate ("calib").

A window is one fp32 tensor (channels, frames + length): the features of up to 30 seconds, and behind them, in the
first row, the token ids that the decoder reads, which fp32 holds exactly.
"""

from __future__ import annotations

import hashlib
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitmill.config.documents import read_json_lines
from bitmill.config.paths import user_path
from bitmill.data.pictures import PARTS
from bitmill.data.text import MAX_BYTES, TextSource
from bitmill.errors import CalibrationError, one_line

RATE = 16_000  # samples a second
SECONDS = 30  # of a window
_FIFTHS = 5
_Part = list[tuple[Path, str]]  # files and what is said in them


def join(features: Tensor, token_ids: Tensor) -> Tensor:
    """Return windows of features (windows, channels, frames) and token ids (windows, length)."""
    rows = features.new_zeros(*features.shape[:2], token_ids.shape[1])
    rows[:, 0] = token_ids.to(features.dtype)
    return torch.cat([features, rows], 2)


def split(windows: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Return features (windows, channels, frames) and token ids (windows, length) of windows."""
    return windows[..., :frames], windows[..., 0, frames:].long()


class RecordingWindows:
    """The recordings of a list; a window is one recording, or for calibration several, with their texts.

    Args:
        source: a .jsonl file.
        processor: processor of transformers, as `AutoProcessor` loads it: a feature extractor and a tokenizer.

    Raises:
        CalibrationError: the source is no such file, or holds no recording.
    """

    prefix: tuple[int, ...] = ()

    def __init__(self, source: TextSource, processor: Any) -> None:
        if not isinstance(source, str) or not source.endswith(".jsonl"):
            raise CalibrationError(
                f"The model reads recordings, and {source!r} is no list of them; give a .jsonl file whose lines "
                "have audio, the path of a WAV file, and text, with --calib, or with --text to measure on."
            )
        self._path, self._processor = user_path(source), processor
        self._entries = list(read_recordings(self._path))
        if not self._entries:
            raise CalibrationError(f"{self._path} lists no recording; give lines with audio and text.")

    def calibration(self, samples: int, seqlen: int, seed: int) -> Tensor:
        """Return windows of recordings of the part "calib" that are joined until 30 seconds are full.

        Args:
            samples: number of windows.
            seqlen: most token ids of a window; all windows have as many as the shortest one.
            seed: of the order.

        Returns:
            fp32 (samples, channels, frames + length).

        Raises:
            CalibrationError: the part is empty, or a recording cannot be read.
        """
        part = self._part("calib")
        if not part or samples < 1:
            raise CalibrationError(
                f"samples is {samples}, and {self._path} has {len(part)} recordings to calibrate on; give more."
            )
        joined = self._joined(part, torch.Generator().manual_seed(seed))
        pairs = [self._window(*next(joined)) for _ in range(samples)]
        length = min(seqlen, *(len(ids) for _, ids in pairs))
        return join(torch.stack([found for found, _ in pairs]), torch.stack([ids[:length] for _, ids in pairs]))

    def held_out(self, split: str, seqlen: int, windows: int | None) -> list[Tensor]:
        """Return the recordings of a part, one each window, cut to `seqlen` token ids.

        Raises:
            CalibrationError: the part has no recording, or one cannot be read.
        """
        chosen = self._part(split)[:windows]
        if not chosen:
            raise CalibrationError(f"{self._path} has no recording in the part {split!r}; add some.")
        pairs = [self._window(samples_of(audio), text) for audio, text in chosen]
        return [join(features[None], ids[None, :seqlen])[0] for features, ids in pairs]

    def domains(self, split: str, seqlen: int, windows: int | None) -> dict[str, int]:
        """Return nothing: recordings are of one domain."""
        return {}

    def describe(self, part: str, windows: int | None = None) -> dict[str, Any]:
        """Return for reports that a window is a recording."""
        return {"unit": "recordings" if windows is None else "windows of recordings"}

    def _part(self, split: str) -> list[tuple[Path, str]]:
        return [(audio, text) for fifth, audio, text in self._entries if fifth in PARTS[split]]

    def _joined(self, part: _Part, generator: torch.Generator) -> Iterator[tuple[np.ndarray, str]]:
        """Yield sound of up to 30 seconds and its text, from recordings in random order, again and again."""
        sounds, texts, length = list[np.ndarray](), list[str](), 0
        while True:
            for index in torch.randperm(len(part), generator=generator).tolist():
                sound = samples_of(part[index][0])
                if sounds and length + len(sound) > SECONDS * RATE:
                    yield np.concatenate(sounds), " ".join(texts)
                    sounds, texts, length = [], [], 0
                sounds.append(sound)
                texts.append(part[index][1])
                length += len(sound)

    def _window(self, sound: np.ndarray, text: str) -> tuple[Tensor, Tensor]:
        """Return features (channels, frames) and the token ids that the decoder reads."""
        features = self._processor.feature_extractor(sound, sampling_rate=RATE, return_tensors="pt")
        ids = self._processor.tokenizer(text)["input_ids"]
        return features["input_features"][0].float(), torch.tensor(ids, dtype=torch.int64)


def samples_of(path: Path) -> np.ndarray:
    """Return the samples of a WAV file of 16 kHz and 16 bits, fp32 in -1 to 1. Raises CalibrationError."""
    try:
        with wave.open(str(path)) as sound:
            form = (sound.getframerate(), sound.getnchannels(), sound.getsampwidth())
            frames = sound.readframes(sound.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise CalibrationError(
            f"{path} holds no sound that can be read ({one_line(error)}); convert it to WAV."
        ) from None
    if form != (RATE, 1, 2):
        raise CalibrationError(
            f"{path} has {form[0]} samples a second, {form[1]} channels and {8 * form[2]} bits; convert it to "
            "16 kHz, one channel and 16 bits."
        )
    return np.frombuffer(frames, dtype="<i2").astype(np.float32) / 32768


def read_recordings(path: Path) -> Iterator[tuple[int, Path, str]]:
    """Yield (fifth, file, text) of the lines of a list. Raises CalibrationError."""
    for number, entry in read_json_lines(path, "list of recordings", CalibrationError, MAX_BYTES):
        audio, text = (entry.get(key) if isinstance(entry, dict) else None for key in ("audio", "text"))
        if not isinstance(audio, str) or not isinstance(text, str):
            raise CalibrationError(f"Line {number} of {path} needs audio, the path of a WAV file, and text.")
        yield int(hashlib.sha256(audio.encode()).hexdigest(), 16) % _FIFTHS, path.parent / audio, text
