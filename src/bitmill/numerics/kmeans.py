"""Weighted 1-D k-means: few levels that represent many numbers with the least weighted squared error.

On a line the clusters of an optimum are intervals of the sorted numbers, so k-means is the choice of k - 1
cuts, and the best cuts among any candidates follow from dynamic programming over prefix sums. Up to 64 numbers
are solved exactly. Trying every position for every cut of long rows would cost k n^2 each; there each cut
gets a window of candidates, coarse and wide, then finer around the choice, in turns until nothing
moves. The result is an optimum over all joint moves of the cuts within their windows: mostly the global
one, and otherwise within a few percent of it (tests/numerics/test_kmeans.py compares with the exact solution). All
rows are processed together, in fp64, because prefix sums cancel.

Coarse candidates divide the present clusters. These start as equal steps of the integral of density^(1/3),
along which the clusters of an optimal quantizer are about equally long (Panter and Dite 1951), mixed with
equal counts so that one outlier does not take them all. Dynamic programs for k-means: Wang and Song 2011,
"Ckmeans.1d.dp".
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

_EXACT = 64  # up to so many numbers are solved exactly
_FINE = 6  # coarse candidates in a cluster
_REACH = 3  # clusters that a cut may move across at once
_STEPS = 10  # candidates on either side in a fine window
_ROUNDS = 20  # a bound; a few suffice
_SLICE = 1 << 17  # candidate pairs evaluated at once, for the cache
_TINY, _HUGE = 1e-300, 1e300


def kmeans(x: Tensor, weight: Tensor, levels: int) -> Tensor:
    """Return the sorted centres of least weighted squared error.

    Args:
        x: (batch, n).
        weight: (batch|1, n), not negative, of any scale; rows whose weights are all 0 weigh every number equally.
        levels: number of centres; some are equal where fewer clusters are of use.

    Returns:
        (batch, levels), in the type of x.
    """
    return _by_slices(x, weight, levels, _optimum)


def kmeans_start(x: Tensor, weight: Tensor, levels: int) -> Tensor:
    """Return centres of clusters equally long along the integral of density^(1/3), a good and cheap start.

    Args:
        x, weight, levels: as of `kmeans`.

    Returns:
        (batch, levels), in the type of x.
    """
    return _by_slices(x, weight, levels, _Line.start)


def _by_slices(x: Tensor, weight: Tensor, levels: int, cuts: Callable[[_Line, int], Tensor]) -> Tensor:
    step = max(1, _SLICE // (2 * _REACH * _FINE + 1) ** 2)
    centres = []
    for start in range(0, x.shape[0], step):
        line = _Line(x[start : start + step], weight if weight.shape[0] == 1 else weight[start : start + step])
        centres.append(line.centres(cuts(line, levels)))
    return torch.cat(centres).to(x.dtype)


class _Line:
    """Sorted rows with the prefix sums of weight and of weight times number, (batch, n + 1), fp64.

    Numbers are relative to their weighted mean. A cut at p has p numbers to its left.
    """

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        weight = torch.where(weight.sum(-1, keepdim=True) > 0, weight, 1.0).to(torch.float64).expand(x.shape)
        counts = weight > 0
        last = x.masked_fill(~counts, -torch.inf).amax(-1, keepdim=True)
        x = torch.where(counts, x, last).to(
            torch.float64
        )  # numbers without weight are moved to where they change nothing
        x, order = x.sort(dim=-1, stable=True)
        weight, counts = weight.gather(-1, order), counts.gather(-1, order)
        weight = weight / weight.sum(-1, keepdim=True)
        self.count = x.shape[-1]
        self.mean = (x * weight).sum(-1, keepdim=True)
        self.x = x = x - self.mean
        self.mass, self.moment = _prefix(weight), _prefix(weight * x)
        reach = torch.nn.functional.pad(x.diff(), (1, 1))
        reach = (reach[:, 1:] + reach[:, :-1]) / 2
        density = weight.pow_(1 / 3).mul_(reach.pow_(2 / 3))
        density /= density.sum(-1, keepdim=True).clamp(min=_TINY)
        self.length = _prefix(density.add_(counts / counts.sum(-1, keepdim=True)).mul_(0.5))

    def places(self, share: Tensor) -> Tensor:
        """Return the cuts at these shares (batch, places) of the length."""
        return torch.searchsorted(self.length, share).clamp_(max=self.count)

    def start(self, levels: int) -> Tensor:
        """Return cuts into intervals of equal length, (batch, levels - 1)."""
        share = torch.arange(1, levels, dtype=torch.float64, device=self.length.device) / levels
        return self.places(share.repeat(self.length.shape[0], 1))

    def rows(self, chosen: Tensor) -> _Line:
        """Select some of the rows."""
        part = copy.copy(self)
        part.x, part.mean, part.length = self.x[chosen], self.mean[chosen], self.length[chosen]
        part.mass, part.moment = self.mass[chosen], self.moment[chosen]
        return part

    def ends(self, cuts: Tensor) -> Tensor:
        """Return the cuts with both ends of the line, (batch, levels + 1)."""
        cuts = torch.nn.functional.pad(cuts, (1, 0))
        return torch.nn.functional.pad(cuts, (0, 1), value=self.count)

    def gain(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the reduction of the sum of squares by one centre between two cuts.

        Args:
            left, right: cuts (batch, a, b); a and b may be 1.

        Returns:
            (batch, a, b); hugely negative where left exceeds right.
        """
        mass = self._of(self.mass, right) - self._of(self.mass, left)
        moment = self._of(self.moment, right) - self._of(self.moment, left)
        return torch.where(mass > 0, moment.square_().div_(mass), mass.mul_(_HUGE))

    def _of(self, sums: Tensor, cuts: Tensor) -> Tensor:
        """Return prefix sums at cuts (batch, a, b); a and b may be 1."""
        return sums.gather(1, cuts.flatten(1)).unflatten(1, cuts.shape[1:])

    def centres(self, cuts: Tensor) -> Tensor:
        """Return means between cuts (batch, levels - 1); a cluster without weight takes its neighbour's."""
        ends = self.ends(cuts)
        mass, moment = self.mass.gather(1, ends).diff(), self.moment.gather(1, ends).diff()
        # of next to no weight, differences of sums are noise: the numbers of a cluster bound their mean
        low = self.x.gather(1, ends[:, :-1].clamp(max=self.count - 1))
        high = self.x.gather(1, (ends[:, 1:] - 1).clamp(min=0))
        means = torch.minimum(torch.maximum(moment / mass.clamp(min=_TINY), low), high)
        means = torch.where(mass > 0, means, -torch.inf).cummax(1).values
        first = torch.where(means > -torch.inf, means, torch.inf).amin(1, keepdim=True)
        return torch.maximum(means, first) + self.mean


def _optimum(line: _Line, levels: int) -> Tensor:
    """Return cuts (batch, levels - 1): coarse moves, then fine ones, until neither finds an improvement."""
    cuts = line.start(levels)
    if levels == 1:
        return cuts
    if line.count <= _EXACT:
        return _choose(line, torch.arange(line.count + 1, device=cuts.device).expand(*cuts.shape, -1))[0]
    active = torch.arange(cuts.shape[0], device=cuts.device)
    for _ in range(_ROUNDS):
        moving = line.rows(active)
        coarse, stride = _coarse(moving, cuts[active])
        moved = _fine(moving, coarse, stride)
        changed = (moved != cuts[active]).any(1)
        cuts[active] = moved
        active = active[changed]
        if not len(active):
            break
    return cuts


def _coarse(line: _Line, cuts: Tensor) -> tuple[Tensor, Tensor]:
    """Improve cuts among a few places in each of the _REACH intervals to either side; return their gaps too."""
    levels, device = cuts.shape[1] + 1, cuts.device
    fine = max(_FINE, _REACH * _FINE * 2 // levels)
    reach = torch.arange(-_REACH * _FINE, _REACH * _FINE + 1, device=device)
    number = (torch.arange(1, levels, device=device)[:, None] * fine + reach).clamp_(0, levels * fine)
    ends = line.length.gather(1, line.ends(cuts))
    part = torch.arange(levels * fine + 1, device=device) / fine
    share = torch.lerp(ends[:, part.long()], ends[:, (part.long() + 1).clamp(max=levels)], part.frac().double())
    window = line.places(share)[:, number.flatten()].unflatten(1, number.shape)
    cuts, index = _choose(line, window)
    around = [window.gather(2, (index + k).clamp(0, len(reach) - 1)[..., None])[..., 0] for k in (-1, 1)]
    return cuts, torch.maximum(cuts - around[0], around[1] - cuts)


def _fine(line: _Line, cuts: Tensor, stride: Tensor) -> Tensor:
    """Improve cuts within _STEPS strides to either side, the stride falling to single places."""
    reach = torch.arange(-_STEPS, _STEPS + 1, device=cuts.device)
    for _ in range(_ROUNDS):
        stride = (stride + _STEPS - 1).div_(_STEPS, rounding_mode="floor").clamp_(min=1)
        window = (cuts[..., None] + stride[..., None] * reach).clamp_(0, line.count)
        moved, _ = _choose(line, window)
        if int(stride.max()) == 1 and torch.equal(moved, cuts):
            break
        cuts = moved
    return cuts


def _choose(line: _Line, window: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the best cut of each window (batch, levels - 1, candidates), and its index, by a dynamic program."""
    cuts = window.shape[1]
    best = [line.gain(torch.zeros_like(window[:, 0]), window[:, 0])]
    for t in range(1, cuts):
        step = line.gain(window[:, t - 1, :, None], window[:, t, None, :])
        best.append(step.add_(best[-1][..., None]).amax(1))
    total = best[-1] + line.gain(window[:, -1], torch.full_like(window[:, -1], line.count))
    index = [total.argmax(1, keepdim=True)]
    for t in range(cuts - 1, 0, -1):
        here = window[:, t].gather(1, index[-1])
        index.append(
            (best[t - 1] + line.gain(window[:, t - 1], here.expand_as(window[:, t]))).argmax(1, keepdim=True)
        )
    chosen = torch.cat(index[::-1], 1)
    # places without weight between two cuts may leave them in the wrong order, at no cost
    return window.gather(2, chosen[..., None])[..., 0].cummax(1).values, chosen


def _prefix(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values.cumsum(-1), (1, 0))
