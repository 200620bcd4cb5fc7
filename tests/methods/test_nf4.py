"""NF4 (QLoRA, arXiv 2305.14314): the table and its construction, and the claims of section 3 on seeded weights."""

from __future__ import annotations

import pytest
import torch

from bitmill.formats import Format
from bitmill.formats.float import Float
from bitmill.formats.normal_float import NormalFloat
from bitmill.formats.quantized import fit_matrix, nearest_matrix
from bitmill.formats.uniform import Uniform
from bitmill.recipes.method import build_recipe

CPU = torch.device("cpu")


def gaussian(seed: int) -> torch.Tensor:
    return torch.randn(64, 1024, generator=torch.Generator().manual_seed(seed)) * 0.02


def heavy_tailed(seed: int) -> torch.Tensor:
    """Student t with 5 degrees of freedom."""
    chi = torch.randn(64, 1024, 5, generator=torch.Generator().manual_seed(100 + seed)).square().sum(-1)
    return gaussian(seed) * (5 / chi).sqrt()


def error(W: torch.Tensor, format: Format, search: bool = False) -> float:
    decoded = nearest_matrix(format, W, fit_matrix(format, W, None, search)).dequantize()
    return float((W - decoded).square().sum() / W.square().sum())


def quantiles(bits: int) -> torch.Tensor:
    """Section 3 and the released code: quantiles of both halves, one more on the positive side, and 0."""
    count = 1 << bits
    edge = 1 - (1 / (2 * count) + 1 / (2 * (count - 1))) / 2
    above = torch.special.ndtri(torch.linspace(edge, 0.5, count // 2 + 1, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(edge, 0.5, count // 2, dtype=torch.float64)[:-1])
    values = torch.cat([below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    return values / values.max()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_table_construction(bits: int) -> None:
    """The printed 4-bit table was rounded to fp32, so it agrees to a few 1e-7."""
    table = NormalFloat(bits).table(CPU).values
    torch.testing.assert_close(table.double(), quantiles(bits), rtol=0, atol=5e-7 if bits == 4 else 1e-7)
    assert {-1.0, 0.0, 1.0} <= set(table.tolist())
    assert torch.equal(table, table.sort().values)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_beats_int4_and_fp4(group_size: int, seed: int) -> None:
    """Section 3 and table 2: NF4 < FP4 and Int4, with one scale a group each."""
    for W in (gaussian(seed), heavy_tailed(seed)):
        nf4 = error(W, NormalFloat(4, group_size))
        assert nf4 < 0.92 * error(W, Uniform(4, group_size, symmetric=True))
        assert nf4 < 0.95 * error(W, Float(4, group_size, "e2m1"))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_asymmetric_grid_ties(seed: int) -> None:
    """Not in the paper: a 4-bit zero point per group compensates for even levels, except for tails."""
    assert error(gaussian(seed), NormalFloat(4, 64)) == pytest.approx(
        error(gaussian(seed), Uniform(4, 64)), rel=0.05
    )
    assert error(heavy_tailed(seed), NormalFloat(4, 64)) < 0.95 * error(heavy_tailed(seed), Uniform(4, 64))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_double_quantization_cost(seed: int) -> None:
    """Section 3: 8-bit constants do not degrade the result; they save 0.37 bits of fp32 constants."""
    for W in (gaussian(seed), heavy_tailed(seed)):
        assert error(W, NormalFloat(4, 64, double=True)) == pytest.approx(error(W, NormalFloat(4, 64)), rel=0.005)


def test_bits_match_paper() -> None:
    """4.127 there, with blocks of 256 constants; here a row of them."""
    recipe = build_recipe("nf4")
    assert recipe.weight.stored_bits((64, 4096)) / (64 * 4096) == 4 + 8 / 64 + 16 / 4096
    single = build_recipe("nf4", {"double": False})
    assert single.weight.stored_bits((64, 4096)) / (64 * 4096) == 4 + 16 / 64
    assert recipe.needs == single.needs


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_smaller_absmax_found(bits: int) -> None:
    for W in (gaussian(0), heavy_tailed(0)):
        assert error(W, NormalFloat(bits, 64), search=True) < 0.92 * error(W, NormalFloat(bits, 64))
