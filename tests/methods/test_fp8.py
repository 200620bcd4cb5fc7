"""FP8 and its smaller relatives: exact value sets (OFP8 1.0, MX 1.0), and the claims of arXiv 2209.05433."""

from __future__ import annotations

import math

import pytest
import torch

from bitmill.formats.float import Float
from bitmill.formats.quantized import fit_matrix, nearest_matrix
from bitmill.formats.uniform import Uniform
from bitmill.numerics.minifloat import ELEMENTS, ElementTable
from bitmill.numerics.table import Table
from bitmill.recipes.method import build_recipe
from bitmill.solvers import Statistics

CPU = torch.device("cpu")
TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
every_element = pytest.mark.parametrize("name", ELEMENTS)


def spread(count: int = 100_000) -> torch.Tensor:
    """Numbers of many magnitudes, and of both signs."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(count, generator=draw) * torch.randn(count, generator=draw).mul(4).exp()


def relative(W: torch.Tensor, decoded: torch.Tensor) -> float:
    return float((W - decoded).square().sum() / W.square().sum())


@pytest.mark.parametrize("name", TORCH)
def test_codes_equal_torch(name: str) -> None:
    theirs = torch.arange(256, dtype=torch.uint8).view(TORCH[name]).float()
    ours = ELEMENTS[name].values()
    finite = torch.isfinite(theirs)
    assert torch.equal(ours[finite], theirs[finite])
    assert (ours[~finite].abs() == ELEMENTS[name].largest).all()
    assert int((~finite).sum()) == {"e4m3": 2, "e5m2": 8}[name]


def test_other_elements() -> None:
    """OCP MX 1.0: the largest numbers of the elements, and FP4 as a whole."""
    assert ELEMENTS["e2m1"].values()[:8].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert {name: ELEMENTS[name].largest for name in ("e3m2", "e2m3")} == {"e3m2": 28, "e2m3": 7.5}
    for kind in ELEMENTS.values():
        values = kind.values()
        assert torch.equal(values[len(values) // 2 :], -values[: len(values) // 2])
        assert values.max() == kind.largest
        assert math.floor(math.log2(kind.largest)) == kind.largest_exponent


@every_element
def test_value_round_trip(name: str) -> None:
    table = ElementTable(name, CPU)
    codes = table.codes(table.values)
    assert torch.equal(table.lookup(codes), table.values)
    kept = codes == torch.arange(len(codes))
    assert (table.values[~kept] == 0).all() | (table.values[~kept].abs() == ELEMENTS[name].largest).any()


@pytest.mark.parametrize("name", TORCH)
def test_rounding_equals_torch_cast(name: str) -> None:
    """Ties included: the middles between neighbours go to the even code."""
    table = ElementTable(name, CPU)
    values = table.values.unique()
    x = torch.cat([spread(), values, (values[1:] + values[:-1]) / 2]).clamp(-values.max(), values.max())
    cast = x.to(TORCH[name])
    codes = table.codes(x)
    assert torch.equal(table.lookup(codes), cast.float())
    assert torch.equal(codes[cast != 0], cast.view(torch.uint8)[cast != 0])
    assert not codes[cast == 0].any()  # -0 is never written


@every_element
def test_arithmetic_equals_search(name: str) -> None:
    values = ELEMENTS[name].values()
    x = torch.cat([spread(), (values.unique()[1:] + values.unique()[:-1]) / 2])
    assert torch.equal(ElementTable(name, CPU).codes(x), Table(values).codes(x))


@every_element
def test_saturation(name: str) -> None:
    table = ElementTable(name, CPU)
    codes = table.codes(torch.tensor([1e30, -1e30, torch.inf, -torch.inf]))
    assert table.lookup(codes).abs().eq(ELEMENTS[name].largest).all()
    reserved = {"e4m3": [0x7F, 0xFF], "e5m2": [0x7C, 0x7D, 0x7E, 0x7F, 0xFC, 0xFD, 0xFE, 0xFF]}.get(name, [])
    assert not set(codes.tolist()) & set(reserved)


def test_exact_values_survive() -> None:
    """A row whose largest magnitude is 448 has scale 1, so that weights trained in e4m3 are kept bit by bit."""
    W = torch.randn(8, 128, generator=torch.Generator().manual_seed(1)).mul(50).to(torch.float8_e4m3fn).float()
    W[:, 0] = 448
    recipe = build_recipe("fp8")
    assert torch.equal(recipe.solver.solve(W, Statistics(), recipe.weight).dequantize(), W)


def test_error_is_relative() -> None:
    """Section 3: the relative error of every weight is at most half a unit in the fourth bit."""
    W = spread(8192).reshape(8, 1024)
    W = W / W.abs().amax(1, keepdim=True)
    format = Float(8, "row")
    decoded = nearest_matrix(format, W, fit_matrix(format, W, None, False)).dequantize()
    normal = W.abs() > 2.0**-14  # of e4m3 after scaling to 448
    assert ((W - decoded).abs() <= W.abs() / 16 * 1.001)[normal].all()
    uniform = nearest_matrix(Uniform(8, "row"), W, fit_matrix(Uniform(8, "row"), W, None, False)).dequantize()
    assert ((W - uniform).abs() > W.abs() / 16)[normal].float().mean() > 0.5


def test_integers_beat_floats_on_normal() -> None:
    """The other side: weights of a row span few octaves, and e4m3 has no more than four bits for each."""
    W = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    errors = [relative(W, nearest_matrix(f, W, fit_matrix(f, W, None, False)).dequantize()) for f in FORMATS]
    assert errors == sorted(errors)
    assert errors[1] > 10 * errors[0]


FORMATS = (Uniform(8, "row"), Float(8, "row"), Float(8, "row", "e5m2"))


@every_element
def test_rounded_equals_the_values_of_codes(name: str) -> None:
    table, x = ElementTable(name, CPU), spread()
    assert torch.equal(table.rounded(x), table.lookup(table.codes(x)))


def test_finer_and_searched_scales_of_inputs() -> None:
    """Each lowers the error of fp8_dynamic's inputs; tokens stay independent of each other."""
    draw = torch.Generator().manual_seed(0)
    X = torch.randn(20, 256, generator=draw) * torch.randn(20, 256, generator=draw)
    chosen = ({}, {"search": True}, {"input_group": 64}, {"input_group": 64, "search": True})
    formats = [build_recipe("fp8_dynamic", options).default.format for options in chosen]
    rounded = [format.effective_inputs(X, {}) for format in formats]
    row, searched, groups, both = (relative(X, each) for each in rounded)
    assert searched < 0.97 * row
    assert groups < 0.85 * row
    assert both < 0.8 * groups
    for format, each in zip(formats, rounded):
        assert torch.equal(format.effective_inputs(X[3:4], {}), each[3:4])
