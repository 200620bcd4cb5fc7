"""Formats find what no encoder stores: NaN and Inf, codes without a meaning, places outside the matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitmill.formats import FORMATS, Format, GroupFormat
from bitmill.formats.microscaling import Microscaling
from bitmill.formats.permuted import Permuted
from bitmill.formats.pyramid import Pyramid
from bitmill.formats.quantized import nearest_matrix
from bitmill.formats.sum import Sum
from bitmill.formats.uniform import Uniform
from bitmill.numerics.packing import pack
from bitmill.numerics.pyramid import count, has_number_beyond
from bitmill.solvers import Statistics
from bitmill.solvers.base import solve
from bitmill.solvers.nearest import Nearest
from helpers.cases import all_wrappers, few_formats, fitted, gram_of, inputs, weights

SHAPE = (12, 96)


def packed(format: Format) -> dict[str, torch.Tensor]:
    W = weights(*SHAPE)
    if isinstance(format, GroupFormat):
        return nearest_matrix(format, W, fitted(format, W, search=False)).pack()
    X = inputs(columns=SHAPE[1])
    stats = Statistics(gram_of(X), X.shape[0], fisher=W.square(), max_abs=X.abs().amax(0))
    return solve(Nearest(), W, stats, format).pack()


@pytest.mark.parametrize("format", [*few_formats(), *all_wrappers()], ids=repr)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_every_part_is_finite(format, bad):
    sound = packed(format)
    assert format.damage_reason(sound, SHAPE) is None
    for name, tensor in sound.items():
        if tensor.is_floating_point():
            changed = tensor.clone()
            changed.view(-1)[-1] = bad
            assert name in format.damage_reason({**sound, name: changed}, SHAPE)


def test_scale_of_microscaling_is_a_number():
    format = Microscaling(4, 32)
    sound = packed(format)
    scale = sound["scale"].clone()
    scale.view(torch.uint8)[1, 2] = 255
    assert format.damage_reason({**sound, "scale": scale}, SHAPE) == "its scale holds NaN"


@pytest.mark.parametrize("order", [[1, 1, *range(2, 96)], [*range(95), 127]], ids=["twice", "outside"])
def test_order_is_a_permutation(order):
    format = Permuted(Uniform(3, 32))
    damaged = {**packed(format), "order": pack(torch.tensor(order), 7)}
    assert format.damage_reason(damaged, SHAPE) == "its order is no permutation of the columns"


@pytest.mark.parametrize("column", [96, 32767, -1])
def test_sparse_columns_are_inside(column):
    format = Sum(Uniform(3, 32), outliers=0.02)
    sound = packed(format)
    changed = sound["sparse_columns"].clone()
    changed[-1] = column
    assert "sparse_columns" in format.damage_reason({**sound, "sparse_columns": changed}, SHAPE)


def test_sparse_columns_are_in_order():
    format = Sum(Uniform(3, 32), outliers=0.05)
    sound = packed(format)
    row = int((sound["sparse_counts"] > 1).nonzero()[0, 0])
    first = int(sound["sparse_counts"][:row].sum())
    for swapped in ([first + 1, first], [first, first]):
        changed = sound["sparse_columns"].clone()
        changed[first : first + 2] = changed[swapped]
        assert "sparse_columns" in format.damage_reason({**sound, "sparse_columns": changed}, SHAPE)


@pytest.mark.parametrize("count", [-1, 1, 97])
def test_sparse_counts_add_up(count):
    format = Sum(Uniform(3, 32), outliers=0.02)
    sound = packed(format)
    changed = sound["sparse_counts"].clone()
    changed[0] += count
    assert "sparse_counts" in format.damage_reason({**sound, "sparse_counts": changed}, SHAPE)


@settings(max_examples=15)
@given(st.data())
def test_numbers_of_points(data):
    bits = data.draw(st.integers(1, 4))
    format, points = Pyramid(bits), data.draw(st.integers(1, 9))
    total, most = count(16, format.pulses), (1 << 16 * bits) - 1
    values = [data.draw(st.sampled_from([0, total - 1]) | st.integers(0, total - 1)) for _ in range(points)]
    wrong = data.draw(st.sampled_from([total, total + 1, most]) | st.integers(total, most))
    for expected in (False, True):
        digits = [[v >> 4 * i & 15 for i in range(4 * bits)] + [15] for v in values]
        words = pack(torch.tensor(digits).view(1, -1), 4).expand(2, -1)
        assert has_number_beyond(words, points, bits, total) == expected
        reason = format.damage_reason({"codes": words, "scale": torch.ones(2, 1)}, (2, 16 * points))
        assert (reason is not None) == expected
        values[data.draw(st.integers(0, points - 1))] = wrong


def test_every_wrapper_checks_its_inner_format():
    inner = Microscaling(4, 32)
    for format in (Sum(inner), Permuted(inner), FORMATS.get("rotated")(inner=inner)):
        sound = packed(format)
        assert format.damage_reason(sound, SHAPE) is None
        damaged = {**sound, "scale": torch.full_like(sound["scale"], -1)}
        assert format.damage_reason(damaged, SHAPE) == "its scale holds NaN"
