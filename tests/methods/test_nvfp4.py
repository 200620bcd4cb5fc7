"""NVFP4 (arXiv 2509.25149) and MXFP4 (OCP MX 1.0): scale rules, value sets, and a comparison."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from bitmill.formats import Format
from bitmill.formats.float import Float
from bitmill.formats.microscaling import Microscaling
from bitmill.formats.normal_float import NormalFloat
from bitmill.formats.nvfp4 import NVFP4
from bitmill.formats.quantized import Quantized, fit_matrix, nearest_matrix
from bitmill.recipes.method import build_recipe
from bitmill.solvers import Statistics
from bitmill.solvers.base import output_error
from bitmill.solvers.gptq import GPTQ
from helpers.cases import inputs


def gaussian(seed: int) -> torch.Tensor:
    return torch.randn(64, 1024, generator=torch.Generator().manual_seed(seed)) * 0.02


def heavy_tailed(seed: int) -> torch.Tensor:
    """Student t with 3 degrees of freedom."""
    chi = torch.randn(64, 1024, 3, generator=torch.Generator().manual_seed(100 + seed)).square().sum(-1)
    return gaussian(seed) * (3 / chi).sqrt()


def solved(W: torch.Tensor, format: Format, search: bool = False) -> Quantized:
    return nearest_matrix(format, W, fit_matrix(format, W, None, search))


def error(W: torch.Tensor, format: Format, search: bool = False) -> float:
    return float((W - solved(W, format, search).dequantize()).square().sum() / W.square().sum())


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("weights", [gaussian, heavy_tailed])
@pytest.mark.parametrize("search", [False, True], ids=["start", "search"])
def test_nvfp4_beats_mxfp4(weights, seed: int, search: bool) -> None:
    """Section 2: finer scales and smaller groups. The scales alone do it, at equal groups, too."""
    W = weights(seed)
    nvfp4, mxfp4 = error(W, NVFP4(4, 16), search), error(W, Microscaling(4, 32), search)
    assert nvfp4 < 0.75 * mxfp4
    assert error(W, NVFP4(4, 32), search) < error(W, Microscaling(4, 32), search)
    assert error(W, NVFP4(4, 16), search) < error(W, Microscaling(4, 16), search)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_8_bit_scales_suffice(seed: int) -> None:
    for W in (gaussian(seed), heavy_tailed(seed)):
        assert error(W, NVFP4(4, 16)) == pytest.approx(error(W, Float(4, 16, "e2m1")), rel=0.05)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_four_over_six(seed: int) -> None:
    """Four Over Six (arXiv 2512.02010): between 4 and 6 there is no level, so some groups are better off below."""
    W = gaussian(seed)
    start, searched = solved(W, NVFP4(4, 16)), solved(W, NVFP4(4, 16), search=True)
    assert error(W, NVFP4(4, 16), search=True) < 0.8 * error(W, NVFP4(4, 16))
    assert (searched.params["scale"] > start.params["scale"]).float().mean() > 0.2


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_normal_float_beats_mxfp4(seed: int) -> None:
    """At 4.25 bits both: fp16 scales for groups of 64 against powers of two for groups of 32."""
    for W in (gaussian(seed), heavy_tailed(seed)):
        assert error(W, NormalFloat(4, 64)) < error(W, Microscaling(4, 32))


def test_standard_scale_rule() -> None:
    """floor(log2(largest)) - 2; values beyond 6 are clipped."""
    W = torch.zeros(5, 32)
    W[:, 3] = torch.tensor([1.0, 1.99, 0.5, -6.0, 7.9])
    got = solved(W, Microscaling(4, 32))
    assert (got.params["scale"][:, 0] - 127).tolist() == [-2, -2, -3, 0, 0]
    assert got.dequantize()[:, 3].tolist() == [1.0, 1.5, 0.5, -6.0, 6.0]


def test_mxfp4_equals_gguf() -> None:
    """llama.cpp's MXFP4, as the gguf package writes it."""
    W = heavy_tailed(0)
    blocks = quants.quantize(W.numpy(), GGMLQuantizationType.MXFP4)
    theirs = torch.from_numpy(quants.dequantize(blocks, GGMLQuantizationType.MXFP4))
    ours = solved(W, Microscaling(4, 32))
    scales = torch.from_numpy(blocks.reshape(64, 32, 17)[..., 0].astype(numpy.float32))
    assert torch.equal(ours.params["scale"], scales)
    assert torch.equal(ours.dequantize(), theirs)


def test_nvfp4_scale_rule() -> None:
    """Largest of the tensor at 6 * 448; scales are E4M3 numbers of it; the largest of a group near 6."""
    W = gaussian(0)
    got = solved(W, NVFP4(4, 16))
    shared = got.params["tensor_scale"]
    assert shared.shape == (1, 1)
    assert float(shared) == pytest.approx(float(W.abs().max()) / (6 * 448), rel=1e-6)
    scales = got.params["scale"].to(torch.uint8).view(torch.float8_e4m3fn).float()
    assert scales.max() == 448
    assert torch.equal(got.format.factor(got.params), scales * shared)
    largest = W.reshape(64, 64, 16).abs().amax(-1)
    assert ((scales * shared * 6 - largest).abs() <= largest / 15.9).all()


def test_bits() -> None:
    shape = (64, 1024)
    count = math.prod(shape)
    assert build_recipe("mxfp4").weight.stored_bits(shape) == 4.25 * count
    assert build_recipe("nvfp4").weight.stored_bits(shape) == 4.5 * count + 32


@pytest.mark.parametrize(
    "format", [NVFP4(4, 16), NVFP4(4, "row"), Microscaling(4, 32), NormalFloat(4, 32, double=True)], ids=repr
)
def test_works_with_gptq(format: Format) -> None:
    """Shared scales stay what they are while groups are refitted one by one."""
    W = heavy_tailed(0)[:16, :128]
    X = inputs(512, 128)
    gram = X.T @ X / len(X)
    nearest = solved(W, format, search=True)
    fed_back = GPTQ().solve(W, Statistics(gram, len(X)), format)
    improved = GPTQ(column_passes=2, group_passes=1).solve(W, Statistics(gram, len(X)), format)
    errors = [output_error(W, q.dequantize(), gram) for q in (nearest, fed_back, improved)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.8 * errors[0]
