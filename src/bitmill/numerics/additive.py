"""Sums of codebook vectors: encode, decode, and fit the codebooks.

    point = sum over m of codebooks[m, codes[:, m]]

    codes      (n, M) integers below K
    codebooks  (M, K, width) fp32
    points     (n, width)

Which codes are best is a quadratic assignment, so the search keeps a beam of hypotheses, codebook by codebook.

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
    """The points (n, width) of codes (n, M); gradients reach the codebooks."""
    points = codebooks[0].index_select(0, codes[:, 0].long())
    for m in range(1, codebooks.shape[0]):
        points = points + codebooks[m].index_select(0, codes[:, m].long())
    return points


def decode_adjoint(values: Tensor, codes: Tensor, size: int) -> Tensor:
    """The adjoint of `decode`: values (n, width) summed over the uses of each vector, (M, size, width)."""
    sums = values.new_zeros(codes.shape[1], size, values.shape[1])
    for m in range(codes.shape[1]):
        sums[m].index_add_(0, codes[:, m].long(), values)
    return sums


def search(pull: Tensor, metric: Tensor, codebooks: Tensor, beam: int) -> tuple[Tensor, Tensor]:
    """Codes (n, M) int64 and points u (n, width) of low u metric u - 2 u pull.

    pull: (n, width).  metric: (width, width), symmetric, positive semi-definite.  beam: hypotheses kept after
    each codebook, rounded down to a power of two. For x, the point to approach, pull is x metric. One codebook
    is searched exactly, and two are with a beam of K.
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
    """Nearly the `count` least of costs (n, hypotheses, K): their values, hypotheses and codes, (n, count) each.

    Sorting out many numbers is dear, finding where a minimum is less so, and its value alone next to free: so
    runs of codes are ranked by their least, and the best runs give one code each. The least of all is exact.
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
    """Codebooks (books, size, width) by k-means of what the codebooks before leave of x.

    x: (n, width).  weight: (n, width) of the squared errors, not negative. A vector that nobody uses is put
    where some x is.
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
    """Random rows of x, each once as long as there are enough."""
    order = torch.randperm(x.shape[0], generator=draw).to(x.device)
    return order.repeat(-(-count // x.shape[0]))[:count]


def _closest(x: Tensor, weight: Tensor, centres: Tensor) -> Tensor:
    """The centre of least weighted squared distance from each x."""
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
    """Codebooks that leave less of <e, weigh(e)>, e what is left of `error` as they move, for fixed codes.

    error: (n, width), what scale * points leave now.  scale: (n, 1).  weigh: a symmetric positive semi-definite
    map of (n, width), diagonal (n|1, width) its diagonal.  Least squares by conjugate gradients, `steps` of
    them, scaled by the diagonal of the normal equations; every step lowers the error.
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
