"""Keep some windows of a text out of training, and with them all others that hold a part of their text."""

from __future__ import annotations

import torch
from torch import Tensor

from bitmill.errors import CalibrationError

_PASSAGE = 16  # tokens in a row that two windows do not share by chance


def hold_apart(windows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Divide windows into those to train on, and the last `count` of them, which are held apart.

    Windows start at random places of a text, so that two may overlap; those that share a passage with a held-apart
    one are left out.

    Args:
        windows: (samples, length) token ids.
        count: windows to hold apart.

    Returns:
        (n, length) and (count, length).

    Raises:
        CalibrationError: no window to train on is left.
    """
    train, apart = windows[:-count], windows[-count:]
    if not len(train):
        raise CalibrationError(
            f"The text gives {len(windows)} windows, of which {count} are held apart; use more --samples "
            "(samples) or a smaller --held-apart (held_apart)."
        )
    known = set().union(*(_passages(window) for window in apart))
    kept = [window for window in train if known.isdisjoint(_passages(window))]
    if not kept:
        raise CalibrationError(
            f"All {len(train)} windows overlap with the {count} that are held apart; give a longer text, or a "
            "smaller --held-apart (held_apart)."
        )
    return torch.stack(kept), apart


def _passages(window: Tensor) -> set[tuple[int, ...]]:
    length = min(_PASSAGE, len(window))
    ids = window.tolist()
    return {tuple(ids[start : start + length]) for start in range(len(ids) - length + 1)}
