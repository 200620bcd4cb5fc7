"""What a model reads of a text: windows of one stream of tokens, or, if it is an encoder, sentences.

A decoder predicts a stream, and windows of it follow one another. An encoder reads a text as a whole and gets
it between tokens of its own ([CLS] and [SEP]), also where windows calibrate it; it is measured on the sentences of
the last fifth of the text (of its characters), for their embeddings are what it is used for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bitmill.data import text
from bitmill.data.text import Windows
from bitmill.errors import CalibrationError

WORDS = 5  # a sentence has at least so many, which leaves headings and tables out
SENTENCES = 3  # at least so many are measured: of two, each is the other's nearest
_END = re.compile(r"(?<=[.!?])\s+|\n\s*\n")
_WORD = re.compile(r"[^\W\d_]{2,}")


SELF = "self"  # calibration source: the model writes its text itself


@dataclass(frozen=True)
class CalibrationData:
    """The calibration text and how much of it is read.

    source: "pydoc", a .txt or .jsonl file, "hf:dataset", or "self" for text that the float model writes.
    samples: number of windows.
    seqlen: tokens of a window.
    seed: of the random places at which windows start.
    """

    source: str = "pydoc"
    samples: int = 128
    seqlen: int = 512
    seed: int = 0


class TextWindows(Protocol):
    """A text as one model reads it; `seqlen` counts the tokens of a window, the model's own included."""

    def calibration(self, samples: int, seqlen: int, seed: int) -> Tensor:
        """Windows (samples, seqlen) of what calibrates. Raises CalibrationError when the text is too short."""
        ...

    def held_out(self, split: str, seqlen: int, windows: int | None) -> Windows:
        """What is measured on: at most `windows` x `seqlen` tokens of a part of the text."""
        ...


def count_windows(held_out: Windows, seqlen: int) -> int:
    """How many windows of `seqlen` tokens hold as much."""
    return -(-sum(len(window) for window in held_out) // seqlen)


class StreamWindows:
    """One stream of tokens."""

    def __init__(self, source: str | Path, tokenizer: Any) -> None:
        self._ids = text.token_stream(source, tokenizer)

    def calibration(self, samples: int, seqlen: int, seed: int) -> Tensor:
        """Windows that start at random places of the first four fifths."""
        return text.calibration_windows(text.split_stream(self._ids, "calib"), samples, seqlen, seed)

    def held_out(self, split: str, seqlen: int, windows: int | None) -> Windows:
        """Windows (w, seqlen) side by side."""
        return text.evaluation_windows(text.split_stream(self._ids, split), seqlen, windows)


class SentenceWindows:
    """Text for an encoder."""

    def __init__(self, source: str | Path, tokenizer: Any) -> None:
        self._text, self._tokenizer = text.load_text(source), tokenizer

    def calibration(self, samples: int, seqlen: int, seed: int) -> Tensor:
        """Windows that start at random places of the first four fifths, each between the model's own tokens."""
        before, after = self._frame()
        own = len(before) + len(after)
        if seqlen < own + 2:
            raise CalibrationError(f"seqlen is {seqlen}, {own} of them the model's own; use at least {own + 2}.")
        part = text.split_stream(self._text, "calib")
        with text.no_length_warning():
            ids = torch.tensor(self._tokenizer(part, add_special_tokens=False)["input_ids"], dtype=torch.int64)
        inside = text.calibration_windows(ids, samples, seqlen - own, seed)
        return torch.cat([before.expand(samples, -1), inside, after.expand(samples, -1)], 1)

    def held_out(self, split: str, seqlen: int, windows: int | None) -> Windows:
        """Distinct sentences, each a tensor (tokens,) of at most `seqlen` tokens, the shortest first.

        Those of the last fifth that occur in what calibrates are left out.
        """
        text.check_windows(1 if windows is None else windows, seqlen)
        seen = set(_sentences(text.split_stream(self._text, "calib"))) if split == "eval" else set()
        found = _sentences(text.split_stream(self._text, split))
        fresh = [sentence for sentence in dict.fromkeys(found) if sentence not in seen]
        room = float("inf") if windows is None else windows * seqlen
        chosen: list[Tensor] = []
        for sentence in fresh:
            ids = self._tokenizer(sentence, truncation=True, max_length=seqlen)["input_ids"]
            room -= len(ids)
            if room < 0:
                break
            chosen.append(torch.tensor(ids, dtype=torch.int64))
        if len(chosen) < SENTENCES:
            raise CalibrationError(
                f"The evaluation text gives {len(chosen)} of the {SENTENCES} sentences of {WORDS} or more words "
                "that neighbours take; give a longer text or more windows."
            )
        return sorted(chosen, key=len)

    def _frame(self) -> tuple[Tensor, Tensor]:
        """The tokens that the tokenizer puts before and after every text."""
        bare = list(self._tokenizer("a", add_special_tokens=False)["input_ids"])
        framed = list(self._tokenizer("a")["input_ids"])
        starts = range(len(framed) - len(bare) + 1)
        at = next((start for start in starts if framed[start : start + len(bare)] == bare), None)
        if at is None:
            raise CalibrationError(
                "The tokenizer spells a text in another way between its own tokens; give token windows instead."
            )
        before, after = framed[:at], framed[at + len(bare) :]
        return torch.tensor(before, dtype=torch.int64), torch.tensor(after, dtype=torch.int64)


def _sentences(whole: str) -> Iterator[str]:
    """Its sentences, in turn, with single spaces."""
    for piece in _END.split(whole):
        sentence = " ".join(piece.split())
        if sentence.endswith((".", "!", "?")) and len(_WORD.findall(sentence)) >= WORDS:
            yield sentence


def check_context_length(config: Any, seqlen: int, flag: str = "--seqlen") -> None:
    """Raises CalibrationError for windows longer than the model can read."""
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and seqlen > limit:
        raise CalibrationError(f"seqlen is {seqlen}, but the model reads at most {limit} tokens; lower {flag}.")
