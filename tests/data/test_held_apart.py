"""Windows that are held apart share no text with those that are trained on."""

from __future__ import annotations

import pytest
import torch

from bitmill.data.held_apart import hold_apart
from bitmill.errors import CalibrationError


def test_windows_that_overlap_with_held_apart_ones_are_left_out():
    stream = torch.arange(1000)
    windows = torch.stack([stream[start : start + 40] for start in (0, 500, 300, 320, 700)])
    train, apart = hold_apart(windows, 2)
    assert train[:, 0].tolist() == [0, 500]  # 300 overlaps with 320
    assert apart[:, 0].tolist() == [320, 700]


def test_too_few_windows():
    windows = torch.arange(120).view(3, 40)
    with pytest.raises(CalibrationError, match="gives 3 windows, of which 3 are held apart"):
        hold_apart(windows, 3)
    with pytest.raises(CalibrationError, match="All 2 windows overlap"):
        hold_apart(windows[:1].expand(3, -1), 1)
