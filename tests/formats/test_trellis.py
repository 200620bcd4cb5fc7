"""Compiled trellis codes are the bytes of those in torch."""

from __future__ import annotations

import pytest
import torch

from bitmill import native
from bitmill.errors import RecipeError
from bitmill.formats.trellis import Trellis
from bitmill.numerics import trellis
from helpers.native_kernels import ALL_ISAS, needs_native


@needs_native
@pytest.mark.parametrize(("bits", "state_bits"), [(1, 8), (2, 8), (2, 11), (3, 9), (4, 10), (4, 8)])
def test_compiled_codes(bits: int, state_bits: int) -> None:
    format, draw = Trellis(bits, state_bits=state_bits), torch.Generator().manual_seed(bits)
    x = torch.randn(5, 64, generator=draw) * torch.tensor([[0.0], [0.3], [1.0], [4.0], [1e30]])
    x[0, 0], x[4, 1] = float("nan"), float("-inf")
    expected = trellis.encode(trellis.fixed_point(x), bits, state_bits)
    points = trellis.decode(expected, bits, state_bits)
    before = native.native().isa()
    try:
        for name in ALL_ISAS:
            native.native().use_isa(name)
            assert torch.equal(format.encode(x), expected), name
            assert torch.equal(format.points(expected), points), name
    finally:
        native.native().use_isa(before)


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    format, x = Trellis(2, state_bits=8), torch.randn(3, 64)
    codes = format.encode(x)
    monkeypatch.setattr(native, "_native", None)
    assert torch.equal(format.encode(x), codes)
    assert format.encode(x[:0]).shape == (0, 16)


@pytest.mark.parametrize(("bits", "state_bits", "most"), [(2, 8, 0.095), (2, 12, 0.078), (3, 12, 0.0215)])
def test_error_of_gaussian_numbers(bits: int, state_bits: int, most: float) -> None:
    """Between the rate-distortion bound and the best vectors of eight numbers (0.091 at 2 bits)."""
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(0)) * trellis.RMS
    error = float((Trellis(bits, state_bits=state_bits).snap(x)[1] - x).square().mean() / trellis.RMS**2)
    assert 4.0**-bits < error < most


def test_every_state_has_its_bits() -> None:
    """A state is the window of the stream that ends with the number's bits."""
    codes = torch.randint(0, 256, (1, 16), dtype=torch.uint8)
    stream = sum(int(byte) << 8 * i for i, byte in enumerate(codes[0].tolist()))
    stream |= stream << 128
    states = [stream >> (128 + 2 * (t + 1) - 12) & 4095 for t in range(64)]
    expected = trellis.points(12, torch.device("cpu"))[torch.tensor(states)]
    assert torch.equal(trellis.decode(codes, 2, 12)[0], expected)


def test_refused() -> None:
    with pytest.raises(RecipeError, match="state_bits is 17; use 8 to 16"):
        Trellis(2, state_bits=17)
