"""A fixed table of values, and rounding to it."""

from __future__ import annotations

import torch
from torch import Tensor

from bitmill.numerics.straight_through import BEYOND

_FEW = 16


class Table:
    """Values by code, and the code of the value nearest to a number.

    Ties round to the even code; of codes with equal values the lowest is chosen.

    values: (n,) fp32, the value of every code, n up to 256.
    rounded_range: the numbers that are rounded and not clipped, up to half a gap beyond the outermost values.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        lowest: dict[float, int] = {}
        for code, value in enumerate(values.tolist()):
            lowest.setdefault(value + 0.0, code)  # -0 + 0 is 0
        ordered = sorted(lowest.items())
        rising = torch.tensor([value for value, _ in ordered], device=values.device)
        self._order = torch.tensor([code for _, code in ordered], dtype=torch.uint8, device=values.device)
        middles = (rising[1:] + rising[:-1]) / 2
        below = torch.nextafter(middles, torch.full_like(middles, -torch.inf))
        # x goes up when it is above the edge, so an edge just below the middle sends ties up
        self._edges = torch.where(self._order[:-1] % 2 == 0, middles, below)
        gaps = BEYOND * (rising[1:] - rising[:-1])
        self.rounded_range = float(rising[0] - gaps[0]), float(rising[-1] + gaps[-1])
        self._in_order = self._order.tolist() == list(range(len(ordered)))

    def lookup(self, codes: Tensor) -> Tensor:
        """Return the values of codes, fp32, any shape."""
        return self.values.index_select(0, codes.flatten().to(torch.int32)).view(codes.shape)

    def rounded(self, x: Tensor) -> Tensor:
        """Return the values nearest to x, fp32, any shape."""
        return self.lookup(self.codes(x))

    def edges_in_order(self) -> Tensor | None:
        """Return fp32 edges, of which a number exceeds as many as its code; None where codes are out of order."""
        return self._edges if self._in_order else None

    def codes(self, x: Tensor) -> Tensor:
        """Return the codes of the values nearest to x, uint8, any shape."""
        if len(self._edges) < _FEW:  # counting edges below x is faster than a binary search
            rank = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
            for edge in self._edges.tolist():
                rank += torch.gt(x, edge).view(torch.uint8)
        else:
            rank = torch.bucketize(x.contiguous(), self._edges, out_int32=True)
        if self._in_order:
            return rank.to(torch.uint8)
        return self._order.index_select(0, rank.flatten().to(torch.int32)).view(x.shape)
