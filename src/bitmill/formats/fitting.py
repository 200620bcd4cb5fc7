"""Steps that formats and solvers share when they fit parameters: searches, refits, errors, fp16 rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from bitmill.formats.base import GroupFormat, Params

FP16_MAX = 65504.0
FP16_TINY = 2.0**-24  # the smallest positive number of fp16

# Importance-weighted searches run over slices of rows of so many numbers, so that temporaries stay in the cache.
SLICE = 1 << 18


# -- searches ---------------------------------------------------------------------------------------------


def alternate(format: GroupFormat, x: Tensor, importance: Tensor, params: Params, rounds: int) -> Params:
    """Alternate between the nearest codes for the parameters and the best parameters for the codes.

    The weighted error never rises, so every slice of rows stops at a local minimum, or after `rounds`.

    Args:
        x: (rows, groups, width).
        importance: (rows|1, groups, width).
        params: the start.
    """

    def improve(x: Tensor, importance: Tensor, params: Params) -> Params:
        for _ in range(rounds):
            fitted = format.refit(x, format.nearest(x, params), importance, params)
            if all(torch.equal(fitted[name], params[name]) for name in params):
                break
            params = fitted
        return params

    return in_slices(improve, x, importance, params)


def in_slices(
    improve: Callable[[Tensor, Tensor, Params], Params], x: Tensor, importance: Tensor, params: Params
) -> Params:
    """Apply `improve` to slices of rows one after the other; parts that all rows share are left unchanged.

    Args:
        improve: maps x, importance and params of some rows to their new params.
        x: (rows, groups, width).
        importance: (rows|1, groups, width).
    """
    pieces = []
    shared = {name for name, value in params.items() if value.shape[0] == 1 < x.shape[0]}
    for cut in _slices(x):
        weight = importance if importance.shape[0] == 1 else importance[cut]
        pieces.append(improve(x[cut], weight, {n: v if n in shared else v[cut] for n, v in params.items()}))
    return {n: v if n in shared else torch.cat([p[n] for p in pieces]) for n, v in params.items()}


def least_error(
    snap: Callable[[Tensor, Params], Tensor],
    x: Tensor,
    importance: Tensor,
    start: Params,
    trials: Iterable[Params],
) -> Params:
    """Return for every group the parameters of least weighted error among `start` and `trials`.

    Args:
        snap: maps x and params to stored numbers.
        x: (rows, groups, width).
        importance: (rows|1, groups, width).
        trials: each holds the parts that differ from `start`.
    """

    def error(params: Params) -> Tensor:
        pieces = []
        for cut in _slices(x):
            weight = importance if importance.shape[0] == 1 else importance[cut]
            piece = {name: v if v.shape[0] == 1 else v[cut] for name, v in params.items()}
            pieces.append(weighted_error(x[cut], snap(x[cut], piece), weight))
        return torch.cat(pieces)

    best, least = dict(start), error(start)
    for trial in trials:
        reached = error({**start, **trial})
        better = reached < least
        least = torch.where(better, reached, least)
        for name, value in trial.items():
            best[name] = torch.where(better, value, best[name])
    return best


def _slices(x: Tensor) -> list[slice]:
    step = max(1, SLICE // max(1, x[0].numel()))
    return [slice(start, start + step) for start in range(0, x.shape[0], step)]


# -- scales -----------------------------------------------------------------------------------------------


def refit_scale(format: GroupFormat, x: Tensor, codes: Tensor, importance: Tensor, params: Params) -> Params:
    """Refit params["scale"], of which the stored numbers are multiples, by weighted least squares at fixed codes.

    A new scale is kept only where it is positive and lowers the error.

    Args:
        x: (rows, groups, width).
        codes: of x.
        importance: (rows|1, groups, width).
        params: the present parameters.
    """
    unit = format.decode(codes, {**params, "scale": torch.ones_like(params["scale"])})
    power = (unit.square() * importance).sum(-1)
    scale = as_stored((unit * x * importance).sum(-1) / power.clamp(min=1e-30))
    old = weighted_error(x, format.decode(codes, params), importance)
    new = weighted_error(x, format.decode(codes, {**params, "scale": scale}), importance)
    return {**params, "scale": torch.where((scale > 0) & (new < old), scale, params["scale"])}


def weighted_rms(x: Tensor, importance: Tensor) -> Tensor:
    """Return the root of each group's weighted mean square; unweighted where all weights are 0.

    Args:
        x: (rows, groups, width).
        importance: (rows|1, groups, width).

    Returns:
        (rows, groups).
    """
    weight = importance.expand(x.shape)
    weight = torch.where(weight.sum(-1, keepdim=True) > 0, weight, torch.ones_like(weight))
    return ((x.square() * weight).sum(-1) / weight.sum(-1)).sqrt()


def divide_or_zero(x: Tensor, scale: Tensor) -> Tensor:
    """Return x / scale, and 0 where scale is 0: all codes decode to 0 there."""
    return torch.where(scale > 0, x / torch.where(scale > 0, scale, 1.0), 0.0)


def positive(scale: Tensor) -> Tensor:
    """Replace 0 by 1, since any scale stores a group of zeros exactly, and bound the rest by fp16's smallest."""
    return torch.where(scale > 0, scale.clamp(min=FP16_TINY), torch.ones_like(scale))


# -- numbers and errors -----------------------------------------------------------------------------------


def as_stored(values: Tensor) -> Tensor:
    """Round to fp16, within its range, and return fp32; magnitudes below its smallest become 0."""
    return values.clamp(-FP16_MAX, FP16_MAX).to(torch.float16).to(torch.float32)


def weighted_error(x: Tensor, y: Tensor, importance: Tensor) -> Tensor:
    """Return the importance-weighted squared error of each group.

    Args:
        x, y: (rows, groups, width).
        importance: (rows|1, groups, width).

    Returns:
        (rows, groups).
    """
    return (x - y).square_().mul_(importance).sum(-1)


def group_params(params: Params, group: int) -> Params:
    """Return the parameters of one group; parts that the groups of a row share stay whole.

    Args:
        params: name -> (rows|1, groups|1, ...).
        group: its index.
    """
    return {name: v if v.shape[1] == 1 else v[:, group : group + 1] for name, v in params.items()}
