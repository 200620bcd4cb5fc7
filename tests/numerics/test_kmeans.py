"""Weighted k-means in one dimension, against the full dynamic program and brute force."""

import itertools
import time

import pytest
import torch
from torch import Tensor

from bitmill.numerics.kmeans import kmeans, kmeans_start


def draw(rows: int, count: int, kind: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, count, generator=generator, dtype=torch.float64)
    weight = torch.ones(rows, count, dtype=torch.float64)
    if "tails" in kind:
        x = x / torch.randn(rows, count, 4, generator=generator).square().mean(-1).sqrt()
    if "outlier" in kind:
        x[:, 3] *= 1000
    if "lattice" in kind:
        x = (3 * x).round()
    if "gradients" in kind:  # squared, and uneven among themselves
        weight = torch.randn(rows, count, generator=generator).square().double()
        weight *= (2 * torch.randn(rows, count, generator=generator)).exp() * 1e-12
    if "sparse" in kind:
        weight *= torch.rand(rows, count, generator=generator) < 0.5
    return x, weight


def error(x: Tensor, weight: Tensor, centres: Tensor) -> Tensor:
    return ((x[..., None] - centres[:, None]).square().amin(-1) * weight).sum(-1)


def least_error(x: Tensor, weight: Tensor, levels: int) -> Tensor:
    """Every cut at every place."""
    x, order = x.sort(-1)
    weight = weight.gather(-1, order)
    x = x - (x * weight).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True).clamp(min=1e-300)
    mass, moment = (torch.nn.functional.pad(v.cumsum(-1), (1, 0)) for v in (weight, weight * x))
    mass, moment = mass[:, None] - mass[:, :, None], moment[:, None] - moment[:, :, None]
    gain = torch.where(mass > 0, moment**2 / mass, 0.0)
    backwards = torch.ones(gain.shape[1:], dtype=torch.bool).tril(-1)
    gain = gain.masked_fill(backwards, -torch.inf)
    best = gain[:, 0]
    for _ in range(levels - 1):
        best = (best[..., None] + gain).amax(1)
    return (weight * x * x).sum(-1) - best[:, -1]


KINDS = ["even", "tails", "gradients", "tails gradients", "lattice", "sparse", "outlier", "outlier gradients"]
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@pytest.mark.parametrize("levels", [2, 4, 8, 16])
@pytest.mark.parametrize("count", [1, 5, 40, 64])
def test_few_numbers_are_exact(kind, levels, count):
    x, weight = draw(16, max(count, 4), kind)
    x, weight = x[:, :count], weight[:, :count]
    found = error(x, weight, kmeans(x, weight, levels))
    noise = 1e-12 * (weight * x * x).sum(-1)  # sums of squares cancel
    assert (found <= least_error(x, weight, levels) * (1 + 1e-5) + noise).all()


@every_kind
@pytest.mark.parametrize("levels", [2, 4, 8, 16])
def test_long_rows_near_optimal(kind, levels):
    x, weight = draw(12, 400, kind)
    noise = 1e-12 * (weight * x * x).sum(-1)
    found = error(x, weight, kmeans(x, weight, levels)) + noise
    ratio = found / (least_error(x, weight, levels) + noise)
    assert ratio.median() < 1 + 1e-6  # most are the optimum
    if "outlier" not in kind:
        assert ratio.mean() < 1.002
        assert ratio.max() < 1.03


@pytest.mark.parametrize("kind", ["even", "gradients"])
def test_equals_all_partitions(kind):
    x, weight = draw(4, 9, kind)
    ordered, order = x.sort(-1)
    sorted_weight = weight.gather(-1, order)
    best = torch.full((4,), torch.inf, dtype=torch.float64)
    for cuts in itertools.combinations(range(1, 9), 2):
        pieces = zip(ordered.tensor_split(cuts, 1), sorted_weight.tensor_split(cuts, 1), strict=True)
        total = sum(
            (w * (p - (w * p).sum(1, keepdim=True) / w.sum(1, keepdim=True)) ** 2).sum(1) for p, w in pieces
        )
        best = torch.minimum(best, total)
    assert torch.allclose(error(x, weight, kmeans(x, weight, 3)), best, rtol=1e-9)


@every_kind
@pytest.mark.parametrize("levels", [1, 2, 8, 256])
def test_centers_sorted_in_range(kind, levels):
    x, weight = draw(8, 100, kind)
    for centres in (kmeans(x.float(), weight.float(), levels), kmeans_start(x.float(), weight.float(), levels)):
        assert centres.shape == (8, levels)
        assert centres.dtype == torch.float32
        assert (centres.diff() >= 0).all()
        assert (centres.amin(1) >= x.amin(1) - 1e-4).all()
        assert (centres.amax(1) <= x.amax(1) + 1e-4).all()


def test_few_distinct_numbers():
    x = torch.tensor([3.0, -1.0, 0.5]).repeat(70)[None]
    assert error(x, torch.ones_like(x), kmeans(x, torch.ones_like(x), 8)) == 0


def test_zero_total_weight():
    x, weight = draw(6, 90, "even")
    weight[2] = 0
    assert torch.equal(kmeans(x, weight, 8), kmeans(x, torch.ones_like(x), 8))


def test_zero_weight_ignored():
    x, weight = draw(6, 90, "gradients")
    x[:, ::7], weight[:, ::7] = 50.0, 0.0
    kept = torch.arange(90) % 7 != 0
    assert torch.allclose(kmeans(x, weight, 8), kmeans(x[:, kept], weight[:, kept], 8), rtol=1e-9)


def test_scale_and_order_invariance():
    x, weight = draw(6, 300, "tails gradients")
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    centres = kmeans(x, weight, 8)
    assert torch.allclose(kmeans(x, weight * 1e9, 8), centres, rtol=1e-9)
    assert torch.allclose(kmeans(x[:, order], weight[:, order], 8), centres, rtol=1e-9)


def test_rows_are_independent():
    x, weight = draw(80, 120, "tails")
    together = kmeans(x, weight, 8)
    assert torch.equal(together, kmeans(x, weight, 8))
    assert torch.equal(together[30:33], kmeans(x[30:33], weight[30:33], 8))
    assert torch.equal(together, kmeans(x, weight[:1], 8))


def test_speed():
    x, weight = draw(576, 576, "tails gradients")
    start = time.process_time()
    kmeans(x, weight, 8)
    assert time.process_time() - start < 3  # a tenth of it on an idle machine
