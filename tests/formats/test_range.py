"""Formats whose scales are fp16 refuse weights beyond its range; others store them."""

from __future__ import annotations

import pytest
import torch

from bitmill.formats import FORMATS, GroupFormat
from bitmill.formats.quantized import fit_matrix, nearest_matrix
from bitmill.formats.range import range_reason
from bitmill.formats.sum import Sum
from bitmill.formats.uniform import Uniform
from bitmill.solvers.base import output_error
from helpers.cases import few_formats, gram_of, inputs, weights

SIZES = [3e38, 1e30, 1e7, 7e4, 1e3, 1e-3, 1e-5, 1e-7, 1e-9, 1e-30, 1e-41]


def sized(largest: float) -> torch.Tensor:
    W = weights(16, 96).double()
    return (W * (largest / W.abs().max())).float()


def error(format: GroupFormat, W: torch.Tensor) -> float:
    decoded = nearest_matrix(format, W, fit_matrix(format, W, None, search=False)).dequantize()
    return float((decoded.double() - W.double()).norm() / W.double().norm())


@pytest.mark.parametrize("format", few_formats(), ids=repr)
def test_accepted_magnitudes_are_stored(format):
    """A size is refused exactly if its error is larger than that of usual weights."""
    usual = error(format, sized(1.0))
    for size in SIZES:
        found = error(format, sized(size))
        is_worse = not found <= 1.25 * usual + 1e-3  # microscaling rounds to powers of two
        assert is_worse <= (range_reason(format, sized(size)) is not None), (size, found, usual)
        if 1e-3 <= size <= 1e3:
            assert range_reason(format, sized(size)) is None


@pytest.mark.parametrize("format", [FORMATS.get("microscaling")(4), FORMATS.get("nvfp4")(4)], ids=repr)
@pytest.mark.parametrize("size", [3e38, 1e30, 1e-9, 1e-25])
def test_wide_scales(format, size):
    assert range_reason(format, sized(size)) is None


def test_few_saturated_weights_are_refused():
    W = weights(64, 512)
    W[3, 5] = 1e5
    assert range_reason(FORMATS.get("normal_float")(4), W).startswith("are up to 1e+05, above the range")
    assert range_reason(Uniform(4), W) is None
    assert range_reason(Sum(Uniform(4)), W) == "are up to 1e+05, and sum stores numbers up to 65504"


def test_zeros_and_small_rows_are_sound():
    W = weights(16, 96)
    W[2], W[3], W[4, :48] = 0, W[3] * 1e-20, 0
    for format in few_formats():
        assert range_reason(format, W) is None
        assert range_reason(format, torch.zeros(16, 96)) is None


@pytest.mark.parametrize("size", [3e38, 1.0, 1e-41])
def test_relative_error_of_any_magnitude(size):
    W, gram = sized(size), gram_of(inputs())
    assert output_error(W, torch.zeros_like(W), None) == pytest.approx(1, rel=1e-3)
    assert output_error(W, torch.zeros_like(W), gram) == pytest.approx(1, rel=1e-3)
    assert output_error(W, W, None) == output_error(W, W, gram) == 0
    assert output_error(W, W / 2, None) == pytest.approx(0.25, rel=1e-2)
