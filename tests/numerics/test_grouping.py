"""Groups of columns: round trip and padding."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from bitmill.numerics.grouping import group_grid, group_width, grouped, grouped_importance, ungrouped

sizes = st.one_of(st.integers(1, 40), st.sampled_from(["row", "tensor"]))
shapes = st.tuples(st.integers(1, 5), st.integers(1, 70))


@given(shapes, sizes)
def test_ungrouped_inverts_grouped(shape, size):
    W = torch.arange(shape[0] * shape[1]).float().view(shape) + 1
    assert torch.equal(ungrouped(grouped(W, size), shape), W)


@given(shapes, sizes)
def test_grid_and_width(shape, size):
    x = grouped(torch.ones(shape), size)
    assert x.shape == (*group_grid(shape, size), group_width(shape, size))
    assert x.sum() == shape[0] * shape[1]  # all else is zero padding
    assert x[..., 0].all()  # no group is padding alone


@given(shapes, st.integers(1, 40))
def test_groups_are_neighbors(shape, size):
    W = torch.randn(shape)
    x = grouped(W, size)
    width = group_width(shape, size)
    for g in range(x.shape[1]):
        piece = W[:, g * width : (g + 1) * width]
        assert torch.equal(x[:, g, : piece.shape[1]], piece)
        assert not x[:, g, piece.shape[1] :].any()


@given(shapes, sizes)
def test_importance_of_padding(shape, size):
    importance = torch.rand(shape[1]) + 0.1
    weight = grouped_importance(importance, shape, size)
    expected = grouped(importance.expand(shape), size)
    assert torch.equal(weight.expand(expected.shape), expected)


@given(shapes, sizes)
def test_default_importance(shape, size):
    assert torch.equal(
        grouped_importance(None, shape, size), grouped_importance(torch.ones(shape[1]), shape, size)
    )


def test_codes_keep_dtype():
    codes = torch.ones(2, 10, dtype=torch.uint8)
    assert grouped(codes, 4).dtype == torch.uint8
