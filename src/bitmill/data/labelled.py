"""Texts with labels, which measure the accuracy of a classifier.

They are the lines of a .jsonl file with a `text` and a `label`. The text alone decides which part a line belongs
to: a fifth is measured on ("eval"), a fifth is for choices ("choose"), three fifths calibrate ("calib").
"""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from bitmill.config.documents import read_json_lines
from bitmill.config.paths import user_path
from bitmill.data.pictures import PARTS
from bitmill.data.sentences import SentenceWindows
from bitmill.data.text import MAX_BYTES, TextSource
from bitmill.errors import CalibrationError
from bitmill.evaluation.vocabulary import token_ids

_FIFTHS = 5


def labelled_windows(source: TextSource, tokenizer: Any) -> SentenceWindows:
    """Return the windows of texts with labels; those of any other text where the source has no labels.

    Args:
        source: see `load_text`.
        tokenizer: the model's tokenizer.
    """
    labelled = read_labelled(source) if isinstance(source, str) and source.endswith(".jsonl") else {}
    return LabelledWindows(labelled, tokenizer) if labelled else SentenceWindows(source, tokenizer)


class LabelledWindows(SentenceWindows):
    """Texts to measure on, label by label, and windows of the texts that calibrate.

    Args:
        labelled: label -> texts.
        tokenizer: the model's tokenizer.
    """

    def __init__(self, labelled: dict[str, list[str]], tokenizer: Any) -> None:
        self._labelled = labelled
        super().__init__(self._part("calib") or ["."], tokenizer)

    def _parts(self, part: str, windows: int | None = None) -> list[tuple[str, int | None]]:
        """Return the joined texts of a part, of which all windows are."""
        return [("\n\n".join(self._part(part)), windows)]

    def held_out(self, split: str, seqlen: int, windows: int | None) -> list[Tensor]:
        """Return the texts of a part, label by label, each cut to `seqlen` tokens.

        Args:
            split: "eval", "choose", "calib" or "all".
            seqlen: most tokens of a text.
            windows: number of texts, equally many of each label; all without it.

        Raises:
            CalibrationError: the part has no text.
        """
        chosen = [text for texts in self._chosen(split, windows).values() for text in texts]
        if not chosen:
            raise CalibrationError(f"No text with a label is in the part {split!r}; give more lines.")
        ids = [token_ids(self._tokenizer, text, truncation=True, max_length=seqlen) for text in chosen]
        return [torch.tensor(row, dtype=torch.int64) for row in ids]

    def domains(self, split: str, seqlen: int, windows: int | None) -> dict[str, int]:
        """Return the number of texts of each label in `held_out`, in its order."""
        return {label: len(texts) for label, texts in self._chosen(split, windows).items()}

    def describe(self, part: str, windows: int | None = None) -> dict[str, Any]:
        """Return for reports how many labels there are, and of windows to measure on that they are texts."""
        return {"labels": len(self._labelled), **({"unit": "texts"} if windows is None else {})}

    def _part(self, split: str) -> list[str]:
        return [text for texts in self._chosen(split, None).values() for text in texts]

    def _chosen(self, split: str, windows: int | None) -> dict[str, list[str]]:
        """Return label -> texts of a part, at most `windows` in all, of each label in turn."""
        part = {
            label: [text for text in texts if _fifth(text) in PARTS[split]]
            for label, texts in self._labelled.items()
        }
        taken = sorted((place, label) for label, texts in part.items() for place in range(len(texts)))[:windows]
        counts = Counter(label for _, label in taken)
        return {label: texts[: counts[label]] for label, texts in part.items()}


def _fifth(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % _FIFTHS


def read_labelled(source: str) -> dict[str, list[str]]:
    """Return label -> texts of a .jsonl file, numbers in order of size; nothing where lines have no label."""
    path = user_path(source)
    found: dict[Any, list[str]] = {}
    for number, entry in read_json_lines(path, "text", CalibrationError, MAX_BYTES):
        if not isinstance(entry, dict) or "label" not in entry:
            return {}
        label, text = entry["label"], entry.get("text")
        if not isinstance(label, (int, str)) or isinstance(label, bool) or not isinstance(text, str):
            raise CalibrationError(f"Line {number} of {path} needs a text and a label, a number or a word.")
        found.setdefault(label, []).append(text)
    if len({type(label) for label in found}) > 1:
        raise CalibrationError(f"The labels of {path} are numbers and words; use one of both.")
    return {str(label): found[label] for label in sorted(found)}
