"""Sums of codebook vectors: encode, decode, and fit the codebooks.

    point = sum over m of codebooks[m, codes[:, m]]

    codes      (n, M) integers below K
    codebooks  (M, K, width) fp32
    points     (n, width)

The choice of codes is a quadratic assignment, so the search keeps a beam of hypotheses, codebook by codebook.

Residual k-means and codes one codebook at a time: Chen, Guan and Wang 2010, "Approximate nearest neighbor search
by residual vector quantization"; sums of free vectors, their beam search and their least squares: Babenko and
Lempitsky 2014, "Additive quantization for extreme vector compression".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_SHARE = 8  # runs of codes for every hypothesis that is to be kept
_SLICE = 1 << 20  # sums of a search at a time: with their temporaries about a second-level cache


def decode(codes: Tensor, codebooks: Tensor) -> Tensor:
    """Return the points of codes; gradients reach the codebooks.

    Args:
        codes: integers (n, M).
        codebooks: (M, K, width).

    Returns:
        Points (n, width).
    """
    points = codebooks[0].index_select(0, codes[:, 0].long())
    for m in range(1, codebooks.shape[0]):
        points = points + codebooks[m].index_select(0, codes[:, m].long())
    return points


def decode_adjoint(values: Tensor, codes: Tensor, size: int) -> Tensor:
    """Apply the adjoint of `decode`: sum values over the uses of each codebook vector.

    Args:
        values: (n, width).
        codes: integers (n, M) below `size`.
        size: K, vectors in a codebook.

    Returns:
        (M, size, width).
    """
    sums = values.new_zeros(codes.shape[1], size, values.shape[1])
    for m in range(codes.shape[1]):
        sums[m].index_add_(0, codes[:, m].long(), values)
    return sums


def search(pull: Tensor, metric: Tensor, codebooks: Tensor, beam: int) -> tuple[Tensor, Tensor]:
    """Find codes whose points u have low u metric u - 2 u pull.

    For a target x the pull is x metric. One codebook is searched exactly, and two are with a beam of K.

    Args:
        pull: (n, width).
        metric: (width, width), symmetric, positive semi-definite.
        codebooks: (M, K, width).
        beam: hypotheses kept after each codebook, rounded down to a power of two.

    Returns:
        Codes (n, M) int64 and points (n, width).
    """
    size = codebooks.shape[1]
    beam = min(1 << (max(1, beam).bit_length() - 1), size)
    step = max(1, _SLICE // (beam * size if len(codebooks) > 1 else size))
    lean = codebooks @ metric  # (M, K, width)
    norms = (lean * codebooks).sum(-1)
    pieces = [_search(piece, codebooks, lean, norms, beam) for piece in pull.split(step)]
    codes = torch.cat(pieces)
    return codes, decode(codes, codebooks)


def _search(pull: Tensor, codebooks: Tensor, lean: Tensor, norms: Tensor, beam: int) -> Tensor:
    costs = torch.addmm(norms[0], pull, codebooks[0].T, alpha=-2)
    if len(codebooks) == 1:
        return costs.argmin(1, keepdim=True)
    value, _, code = _best(costs[:, None], beam)
    codes = [code]
    left = pull[:, None] - lean[0].index_select(0, code.flatten()).unflatten(0, code.shape)
    for m in range(1, len(codebooks)):
        costs = torch.addmm(norms[m], left.flatten(0, 1), codebooks[m].T, alpha=-2).unflatten(0, value.shape)
        value, parent, code = _best(costs.add_(value[..., None]), beam if m < len(codebooks) - 1 else 1)
        codes = [c.gather(1, parent) for c in codes] + [code]
        parents = left.gather(1, parent[..., None].expand(-1, -1, left.shape[2]))
        left = parents - lean[m].index_select(0, code.flatten()).unflatten(0, code.shape)
    return torch.cat(codes, 1)


def _best(costs: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return nearly the `count` least of costs (n, hypotheses, K): values, hypotheses and codes, (n, count) each.

    Sorting many numbers is expensive, the position of a minimum is cheaper, and its value alone almost free: so
    runs of codes are ranked by their minima, and the best runs give one code each. The least of all is exact.
    """
    hypotheses, size = costs.shape[1:]
    count = min(count, hypotheses * size)
    cuts = min(size, max(1, 1 << (_SHARE * count // hypotheses - 1).bit_length())) if count > 1 else 1
    runs = costs.unflatten(2, (cuts, size // cuts)).flatten(1, 2)
    least = runs.amin(2)
    value, kept = least.topk(count, 1, largest=False) if count > 1 else least.min(1, keepdim=True)
    code = runs.gather(1, kept[..., None].expand(-1, -1, size // cuts)).argmin(2)
    return value, kept // cuts, code + kept % cuts * (size // cuts)


def residual_kmeans(x: Tensor, weight: Tensor, books: int, size: int, rounds: int, seed: int = 0) -> Tensor:
    """Fit codebooks one after the other by k-means of the residual that earlier codebooks leave.

    A vector without any x assigned to it is moved to a random x.

    Args:
        x: (n, width).
        weight: (n, width) of the squared errors, not negative.
        books: number of codebooks.
        size: vectors in each.
        rounds: iterations of k-means for each codebook.
        seed: of the random starts.

    Returns:
        Codebooks (books, size, width).
    """
    draw = torch.Generator().manual_seed(seed)
    codebooks = x.new_empty(books, size, x.shape[1])
    for m in range(books):
        centres = x[_places(draw, x, size)]
        for _ in range(rounds):
            code = _closest(x, weight, centres)
            mass = torch.zeros_like(centres).index_add_(0, code, weight)
            moment = torch.zeros_like(centres).index_add_(0, code, weight * x)
            used = torch.bincount(code, minlength=size) > 0
            centres = torch.where(mass > 0, moment / mass.clamp(min=1e-30), centres)
            centres = torch.where(used[:, None], centres, x[_places(draw, x, size)])
        x = x - centres[_closest(x, weight, centres)]
        codebooks[m] = centres
    return codebooks


def _places(draw: torch.Generator, x: Tensor, count: int) -> Tensor:
    """Return `count` random rows of x, without repetition while there are enough."""
    order = torch.randperm(x.shape[0], generator=draw).to(x.device)
    return order.repeat(-(-count // x.shape[0]))[:count]


def _closest(x: Tensor, weight: Tensor, centres: Tensor) -> Tensor:
    """Return the index of the centre of least weighted squared distance from each x."""
    step, squares = max(1, _SLICE // len(centres)), centres.square().T
    pieces = zip(x.split(step), weight.split(step))
    return torch.cat([torch.addmm(w @ squares, w * v, centres.T, alpha=-2).argmin(1) for v, w in pieces])


def refit(
    error: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    scale: Tensor,
    apply_metric: Callable[[Tensor], Tensor],
    diagonal: Tensor,
    steps: int,
) -> Tensor:
    """Refit codebooks at fixed codes so that less of <e, apply_metric(e)> is left, e the error that remains.

    Least squares by conjugate gradients, scaled by the diagonal of the normal equations; every step lowers the
    error.

    Args:
        error: (n, width), the present error, target - scale * points.
        codes: integers (n, M).
        codebooks: (M, K, width).
        scale: (n, 1).
        apply_metric: a symmetric positive semi-definite map of (n, width).
        diagonal: (n|1, width), the diagonal of that map.
        steps: of conjugate gradients.

    Returns:
        Codebooks (M, K, width).
    """
    size = codebooks.shape[1]
    curvature = decode_adjoint(scale.square() * diagonal, codes, size)
    ridge = 1e-5 * curvature.mean().clamp(min=1e-30)
    inverse = 1 / (curvature + ridge)
    moved = torch.zeros_like(codebooks)
    residual = decode_adjoint(scale * apply_metric(error), codes, size)
    direction = toward = inverse * residual
    power = (residual * toward).sum()
    for _ in range(steps):
        bent = (
            decode_adjoint(scale * apply_metric(scale * decode(codes, direction)), codes, size) + ridge * direction
        )
        bend = (direction * bent).sum()
        if not bool(bend > 0):
            break
        moved = moved + (power / bend) * direction
        residual = residual - (power / bend) * bent
        toward = inverse * residual
        before, power = power, (residual * toward).sum()
        direction = toward + (power / before) * direction
    return codebooks + moved
