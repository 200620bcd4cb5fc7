"""Sums of codebook vectors, against brute force and dense least squares."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bitmill.numerics.additive import decode, decode_adjoint, refit, residual_kmeans, search

WIDTH = 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(books: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """pull, a metric, codebooks."""
    A = normal(WIDTH, WIDTH, seed=1)
    return normal(40, WIDTH), A @ A.T + 0.1 * torch.eye(WIDTH), normal(books, size, WIDTH, seed=2) / 2


def value(u: Tensor, pull: Tensor, metric: Tensor) -> Tensor:
    return ((u @ metric) * u).sum(-1) - 2 * (u * pull).sum(-1)


def best(pull: Tensor, metric: Tensor, codebooks: Tensor) -> Tensor:
    """The least value over all codes, (n,)."""
    every = itertools.product(range(codebooks.shape[1]), repeat=len(codebooks))
    points = decode(torch.tensor(list(every)), codebooks)
    return value(points[None], pull[:, None], metric).amin(1)


@pytest.mark.parametrize("books", [1, 2])
@pytest.mark.parametrize("size", [2, 8, 16])
def test_full_beam_is_exact(books, size):
    pull, metric, codebooks = case(books, size)
    codes, points = search(pull, metric, codebooks, beam=size)
    assert torch.equal(points, decode(codes, codebooks))
    assert torch.allclose(value(points, pull, metric), best(pull, metric, codebooks), rtol=0, atol=1e-9)


def test_beam_with_more_codebooks():
    """Of codebooks that k-means made, a full beam leaves less than 5 % more error than all 4096 sums."""
    x, metric = normal(40, WIDTH), case(1, 2)[1]
    codebooks = residual_kmeans(
        normal(2000, WIDTH, seed=5), torch.ones(2000, WIDTH, dtype=torch.float64), 3, 16, 8
    )
    pull = x @ metric
    constant = (pull * x).sum(1)
    least = (best(pull, metric, codebooks) + constant).mean()
    reached = (value(search(pull, metric, codebooks, 16)[1], pull, metric) + constant).mean()
    assert least - 1e-9 <= reached < 1.05 * least


@pytest.mark.parametrize("books", [2, 3])
def test_wider_beam_helps(books):
    pull, metric, codebooks = case(books, 16)
    means = [value(search(pull, metric, codebooks, b)[1], pull, metric).mean() for b in (1, 2, 4, 8, 16)]
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(means))
    assert means[-1] < means[0]


def test_beam_rounded_to_power_of_2():
    pull, metric, codebooks = case(3, 16)
    for beam, same in ((3, 2), (7, 4), (100, 16), (0, 1)):
        assert torch.equal(search(pull, metric, codebooks, beam)[0], search(pull, metric, codebooks, same)[0])


def test_slices_do_not_matter(monkeypatch):
    pull, metric, codebooks = case(3, 8)
    whole = search(pull, metric, codebooks, 4)[0]
    monkeypatch.setattr("bitmill.numerics.additive._SLICE", 100)
    assert torch.equal(search(pull, metric, codebooks, 4)[0], whole)


def test_gather_back_is_adjoint():
    codes = torch.randint(0, 8, (50, 3), generator=torch.Generator().manual_seed(0))
    values, codebooks = normal(50, WIDTH), normal(3, 8, WIDTH, seed=1)
    torch.testing.assert_close(
        (values * decode(codes, codebooks)).sum(), (decode_adjoint(values, codes, 8) * codebooks).sum()
    )


def test_refit_is_least_squares():
    """Against the dense solution of the normal equations, in a metric that couples neighbours."""
    codes = torch.randint(0, 4, (30, 2), generator=torch.Generator().manual_seed(0))
    target, scale, start = normal(30, WIDTH), normal(30, 1, seed=1).abs() + 0.5, normal(2, 4, WIDTH, seed=2)
    A = normal(120, 120, seed=3) / 11
    metric = A @ A.T + torch.eye(120)

    def apply_metric(e: Tensor) -> Tensor:
        return (metric @ e.reshape(-1)).reshape(-1, WIDTH)

    def left(codebooks: Tensor) -> float:
        e = target - scale * decode(codes, codebooks)
        return float((e * apply_metric(e)).sum())

    units = torch.eye(32, dtype=torch.float64).reshape(32, 2, 4, WIDTH)
    basis = torch.stack([(scale * decode(codes, unit)).reshape(-1) for unit in units], 1)
    solved = torch.linalg.lstsq(basis.T @ metric @ basis, basis.T @ (metric @ target.reshape(-1)), driver="gelsd")
    least = left(solved.solution.reshape(2, 4, WIDTH))
    diagonal = metric.diagonal().reshape(-1, WIDTH)
    errors = []
    for steps in (0, 1, 2, 4, 8, 60):
        error = target - scale * decode(codes, start)
        errors.append(left(refit(error, codes, start, scale, apply_metric, diagonal, steps)))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(left(start))
    assert errors[-1] == pytest.approx(least, rel=1e-4)


def test_codebooks_lower_residual():
    x, weight = normal(400, WIDTH).float(), torch.rand(400, WIDTH, generator=torch.Generator().manual_seed(4))
    eye = torch.eye(WIDTH)
    left = [float((x.square() * weight).sum())]
    for books in (1, 2, 3):
        codebooks = residual_kmeans(x, weight, books, 16, 10)
        error = x - search(x, eye, codebooks, 16)[1]
        left.append(float((error.square() * weight).sum()))
    assert all(b < 0.8 * a for a, b in itertools.pairwise(left))


def test_weighted_centers():
    x = normal(400, WIDTH).float()
    weight = torch.ones(400, WIDTH)
    weight[:, 0] = 100
    plain, drawn = (residual_kmeans(x, w, 1, 16, 15) for w in (torch.ones_like(weight), weight))
    eye = torch.eye(WIDTH)
    weighted = torch.diag(weight[0])
    errors = [
        ((x - search(x @ m, m, c, 16)[1]).square() * weight).sum() for c, m in ((plain, eye), (drawn, weighted))
    ]
    assert errors[1] < 0.5 * errors[0]


def test_few_vectors_and_zero_weight():
    x = normal(5, WIDTH).float()
    codebooks = residual_kmeans(x, torch.ones_like(x), 2, 16, 5)
    assert torch.allclose(search(x, torch.eye(WIDTH), codebooks, 16)[1], x, atol=1e-5)
    assert torch.isfinite(residual_kmeans(x, torch.zeros_like(x), 2, 16, 5)).all()
