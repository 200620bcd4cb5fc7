"""HQQ (Badri and Shaji 2023): its objective, pitfalls of its released code, and limits of its claim."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.formats.binary_coding import BinaryCoding
from bitmill.formats.uniform import Uniform
from bitmill.recipes.method import build_recipe
from bitmill.recipes.recipe import Recipe
from bitmill.solvers import Statistics
from bitmill.solvers.base import output_error
from bitmill.solvers.hqq import HQQ
from bitmill.solvers.nearest import Nearest

P = 0.7


def weights(seed: int) -> Tensor:
    """Student t with 5 degrees of freedom, of the size that weights have."""
    draw = torch.Generator().manual_seed(seed)
    chi = torch.randn(64, 512, 5, generator=draw).square().sum(-1)
    return torch.randn(64, 512, generator=draw) * 0.02 * (5 / chi).sqrt()


def rtn(W: Tensor, bits: int, zero: str = "integer") -> Tensor:
    return Nearest().solve(W, Statistics(), Uniform(bits, 64, zero=zero)).dequantize()  # type: ignore[arg-type]


def hqq(W: Tensor, bits: int, **options: float) -> Tensor:
    recipe = build_recipe("hqq", {"bits": bits, **options})
    return recipe.solver.solve(W, Statistics(), recipe.weight).dequantize()


def objective(W: Tensor, decoded: Tensor) -> Tensor:
    """sum |w - w^|^p of every group."""
    return (W - decoded).abs().pow(P).reshape(64, 8, 64).sum(-1)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_objective_falls(bits: int, seed: int) -> None:
    W = weights(seed)
    reached = objective(W, hqq(W, bits))
    assert reached.sum() < 0.99 * objective(W, rtn(W, bits)).sum()
    # against its own start no group loses: the best zero of each is kept
    assert (reached <= objective(W, rtn(W, bits, "float")) * (1 + 1e-6)).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("bits", [3, 4])
def test_weight_error_falls(bits: int, seed: int) -> None:
    W = weights(seed)
    assert output_error(W, hqq(W, bits), None) < 0.92 * output_error(W, rtn(W, bits), None)


def test_more_rounds_never_worse() -> None:
    W = weights(3)
    reached = [float(objective(W, hqq(W, 3, rounds=n)).sum()) for n in (0, 1, 3, 10, 20)]
    assert reached == sorted(reached, reverse=True)
    assert reached[-1] < reached[0]


def test_threshold_unit() -> None:
    """With beta = 10 in the unit of the weights, as released, every error of these weights is under the
    threshold, and what remains is a mean; in steps of the grid the split does work."""
    W = weights(0)
    rest = (W - rtn(W, 4, "float")).abs()
    assert (rest - rest.pow(P - 1) / 10 < 0).all()
    plain = objective(W, hqq(W, 4, beta=1e-9)).sum()  # nothing is ever above the threshold
    assert objective(W, hqq(W, 4)).sum() < 0.995 * plain


def test_scale_invariance() -> None:
    """Powers of two, which fp16 scales follow exactly."""
    W = weights(1)
    torch.testing.assert_close(hqq(W * 16, 3) / 16, hqq(W, 3), rtol=1e-5, atol=1e-7)


def test_float_zero_point() -> None:
    """A limit of the claim: an integer zero point keeps every 0, that of HQQ moves it by up to half a step."""
    W = weights(2)
    W[torch.rand(W.shape, generator=torch.Generator().manual_seed(0)) < 0.1] = 0
    assert not rtn(W, 3)[W == 0].any()
    assert (hqq(W, 3)[W == 0] != 0).float().mean() > 0.9


def test_moves_free_parameters() -> None:
    """Binary coding has an offset, and so the same zero to search for."""
    W, format = weights(0), BinaryCoding(3, 64, offset=True)
    found = HQQ().solve(W, Statistics(), format).dequantize()
    start = Nearest().solve(W, Statistics(), format).dequantize()
    assert objective(W, found).sum() < objective(W, start).sum()
    with pytest.raises(RecipeError, match="zero=float"):
        Recipe("test", Uniform(3), HQQ())


def test_zero_point_bits() -> None:
    assert build_recipe("hqq", {"bits": 4}).weight.stored_bits((64, 512)) == 64 * 512 * (4 + 32 / 64)


def test_least_squares_scale_and_zero() -> None:
    """Refitting scale and zero point lowers the squared error below HQQ's, which keeps the scale."""
    from bitmill.solvers.alternating import Alternating

    W, format = weights(0), Uniform(3, 64, zero="float")
    assert output_error(W, Alternating().solve(W, Statistics(), format).dequantize(), None) < output_error(
        W, hqq(W, 3), None
    )
