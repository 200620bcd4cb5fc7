"""Permute: deal the columns of every matrix to the blocks of its format by importance.

Problem    vector codes spend as many bits on blocks of unimportant inputs as on important ones
Equation   W -> W P, with the most important columns at the first place of every block, and so on
Needs      the Gram matrix of the inputs
Cost       a gather of the inputs at run time; log2(columns) bits a column
Source     bitmill's
"""

from __future__ import annotations

from dataclasses import dataclass

from bitmill.formats import Format
from bitmill.formats.permuted import Permuted
from bitmill.transforms.base import TRANSFORMS, FormatTransform


@TRANSFORMS.register("permute")
@dataclass(frozen=True)
class Permute(FormatTransform):
    """An order of the columns for each matrix."""

    def wrap(self, format: Format) -> Permuted:
        """Return the format for the permuted columns."""
        return Permuted(format)
