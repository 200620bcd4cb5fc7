"""Windows of encoders: texts between special tokens to calibrate on, sentences to measure on.

Encoders read a text as a whole between special tokens ([CLS] and [SEP]), also in calibration windows. They are
measured on sentences, because sentence embeddings are their use.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from bitmill.data import text
from bitmill.data.domain import domain_documents
from bitmill.data.mixture import apportion, is_domain, shares
from bitmill.data.text import TextSource, Windows
from bitmill.data.windows import check_special_tokens, special_tokens
from bitmill.errors import CalibrationError
from bitmill.evaluation.vocabulary import token_ids

MIN_WORDS = 5  # of a sentence, which excludes headings and tables
MIN_SENTENCES = 3  # of an evaluation: of two sentences, each is the nearest of the other
_END = re.compile(r"(?<=[.!?])\s+|\n\s*\n")
_WORD = re.compile(r"[^\W\d_]{2,}")


class SentenceWindows:
    """Windows between special tokens, and sentences to measure on."""

    def __init__(self, source: TextSource, tokenizer: Any) -> None:
        self._source, self._tokenizer = source, tokenizer
        self._whole = "" if is_domain(source) else text.load_text(source)
        self.prefix, self._suffix = special_tokens(tokenizer)

    def calibration(self, samples: int, seqlen: int, seed: int) -> Tensor:
        """Return windows that start at random places of the part "calib", each between special tokens.

        Returns:
            (samples, seqlen) token ids.

        Raises:
            CalibrationError: The text or `seqlen` is too short.
        """
        text.check_windows(samples, seqlen)
        before, after = (torch.tensor(ids, dtype=torch.int64) for ids in (self.prefix, self._suffix))
        special = len(before) + len(after)
        check_special_tokens(seqlen, special)
        inside = []
        for part, count in self._parts("calib", samples):
            with text.no_length_warning():
                ids = torch.tensor(token_ids(self._tokenizer, part, add_special_tokens=False), dtype=torch.int64)
            inside.append(text.calibration_windows(ids, count or samples, seqlen - special, seed))
        return torch.cat([before.expand(samples, -1), torch.cat(inside), after.expand(samples, -1)], 1)

    def held_out(self, split: str, seqlen: int, windows: int | None) -> Windows:
        """Return distinct sentences, shortest first.

        Sentences of the evaluation part that also occur in the calibration part are left out.

        Returns:
            A tensor (tokens,) per sentence, of at most `seqlen` tokens.

        Raises:
            CalibrationError: There are too few sentences.
        """
        text.check_windows(1 if windows is None else windows, seqlen)
        calibration = _sentences(part for part, _ in self._parts("calib")) if split == "eval" else set()
        chosen: list[Tensor] = []
        for part, _ in self._parts(split):
            chosen += self._tokens([s for s in _sentences([part]) if s not in calibration], windows, seqlen)
        if len(chosen) < MIN_SENTENCES:
            raise CalibrationError(
                f"The evaluation text gives {len(chosen)} of at least {MIN_SENTENCES} sentences of {MIN_WORDS} "
                "or more words, which nearest neighbours need; give a longer text or more windows."
            )
        return sorted(chosen, key=len)

    def _parts(self, part: str, windows: int | None = None) -> list[tuple[str, int | None]]:
        """Return texts and how many of the windows are from each: one by domain, or one part of the whole text."""
        if not is_domain(self._source):
            return [(text.split_stream(self._whole, part), windows)]
        weights = shares(str(self._source), part)
        counts: Mapping[str, int | None] = (
            dict.fromkeys(weights) if windows is None else apportion(windows, weights)
        )
        return [("\n\n".join(domain_documents(name, part)), n) for name, n in counts.items() if n != 0]

    def _tokens(self, sentences: Iterable[str], windows: int | None, seqlen: int) -> list[Tensor]:
        """Return the tokens of the first sentences, at most windows x seqlen in all."""
        remaining = float("inf") if windows is None else windows * seqlen
        chosen: list[Tensor] = []
        for sentence in sentences:
            ids = token_ids(self._tokenizer, sentence, truncation=True, max_length=seqlen)
            remaining -= len(ids)
            if remaining < 0:
                break
            chosen.append(torch.tensor(ids, dtype=torch.int64))
        return chosen

    def domains(self, split: str, seqlen: int, windows: int | None) -> dict[str, int]:
        """Return nothing: sentences are sorted by length, and neighbours are of any domain."""
        return {}

    def describe(self, part: str, windows: int | None = None) -> dict[str, Any]:
        """Return the part and the calibration windows by domain; nothing where the text is no domain.

        Args:
            part: part of the documents.
            windows: number of calibration windows.
        """
        if not is_domain(self._source):
            return {}
        counts = {} if windows is None else {"domains": apportion(windows, shares(str(self._source), part))}
        return {"part": part, **counts}


def _sentences(parts: Iterable[str]) -> dict[str, None]:
    """Return the distinct sentences of texts, in order and with single spaces."""
    pieces = (" ".join(piece.split()) for part in parts for piece in _END.split(part))
    return {p: None for p in pieces if p.endswith((".", "!", "?")) and len(_WORD.findall(p)) >= MIN_WORDS}
