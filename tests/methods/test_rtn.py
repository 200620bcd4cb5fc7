"""Round to nearest: theory of uniform quantizers, on seeded Gaussian weights."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from bitmill.formats.quantized import fit_matrix, nearest_matrix
from bitmill.recipes.method import build_recipe

BITS = (2, 3, 4, 5, 6, 8)


def error(bits: int, group_size: int | str, outlier: bool = False) -> float:
    """Relative squared error of a (64, 1024) matrix whose rows have scales of their own."""
    generator = torch.Generator().manual_seed(bits)
    W = torch.randn(64, 1024, generator=generator) * torch.logspace(-1, 0, 64)[:, None]
    if outlier:
        W[:, 5] *= 40
    format = build_recipe("rtn", {"bits": bits, "group_size": group_size}).weight
    decoded = nearest_matrix(format, W, fit_matrix(format, W, None, False)).dequantize()
    rest = torch.arange(1024) != 5  # the energy of the outlier itself is left out
    return float(((W - decoded)[:, rest].square().sum(1) / W[:, rest].square().sum(1)).mean())


@pytest.mark.parametrize("group_size", [64, "row"])
def test_six_decibels_per_bit(group_size) -> None:
    """The error of a step D is D^2 / 12 and a bit halves the step (2^bits - 1 of them fill the range)."""
    for low, high in pairwise(BITS):
        gain = 20 * math.log10((2**high - 1) / (2**low - 1))
        found = 10 * math.log10(error(low, group_size) / error(high, group_size))
        assert found == pytest.approx(gain, abs=1.0)


@pytest.mark.parametrize("bits", BITS)
def test_smaller_groups_help(bits) -> None:
    """ZeroQuant-V2 (arXiv 2303.08302), section 5: per tensor, per row, groups."""
    errors = [error(bits, group) for group in ("tensor", "row", 128, 64)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("bits", BITS)
def test_outlier_affects_only_group(bits) -> None:
    """SqueezeLLM (arXiv 2306.07629), section 4.3: one far value stretches the range that all of a row share."""
    assert error(bits, "row", outlier=True) > 3 * error(bits, 64, outlier=True)
