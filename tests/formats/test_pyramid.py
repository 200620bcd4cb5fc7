"""The compiled search for the nearest point gives the bytes of the one in torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitmill import native
from bitmill.formats.pyramid import Pyramid
from helpers.native_kernels import ALL_ISAS, needs_native

pytestmark = needs_native
HARD = torch.tensor([[0.0] * 16, [float("nan")] * 16, [float("inf")] + [1.0] * 15, [1e-44] * 16, [1.0] * 16,
                     [-1e30] + [0.0] * 15, [0.0] * 15 + [1.0], [3.0, -3.0] * 8])  # fmt: skip


def assert_equal(bits: int, x: torch.Tensor) -> None:
    format = Pyramid(bits)
    expected, vectors = format._snap_in_torch(x)
    assert torch.equal(format._points_in_torch(expected), vectors)
    assert torch.equal(format.points(expected), vectors)
    before = native.native().isa()
    try:
        for name in ALL_ISAS:
            native.native().use_isa(name)
            codes, found = format.snap(x)
            assert torch.equal(codes, expected), name
            assert torch.equal(found, vectors), name
    finally:
        native.native().use_isa(before)


@given(st.sampled_from([1, 2, 3, 4]), st.integers(0, 2**32), st.integers(0, 300))
def test_nearest_points(bits: int, seed: int, count: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 16, generator=draw) * torch.rand(count, 16, generator=draw).mul(4).exp()
    assert_equal(bits, x)
    assert_equal(bits, x.round())  # many alike


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_nearest_points_of_hard_vectors(bits: int) -> None:
    assert_equal(bits, HARD)
    assert_equal(bits, HARD.T.contiguous().T)  # another order in memory


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(40, 16)
    codes, vectors = Pyramid(2).snap(x)
    monkeypatch.setattr(native, "_native", None)
    again, repeated = Pyramid(2).snap(x)
    assert torch.equal(codes, again)
    assert torch.equal(vectors, repeated)
