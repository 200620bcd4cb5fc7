"""Pyramid points: counted, numbered, projected."""

from __future__ import annotations

import hashlib
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitmill.numerics.pyramid import count, most_pulses, number, point, project

SHAPES = st.tuples(st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 58))


def unsigned(numbers: torch.Tensor) -> list[int]:
    return [n % (1 << 64) for n in numbers.tolist()]


def everything(dimension: int, pulses: int) -> torch.Tensor:
    """All points by brute force."""
    box = itertools.product(range(-pulses, pulses + 1), repeat=dimension)
    return torch.tensor([y for y in box if sum(map(abs, y)) == pulses])


@pytest.mark.parametrize(("dimension", "pulses"), [(1, 4), (2, 5), (4, 3), (8, 2)])
def test_numbering_is_bijective(dimension: int, pulses: int) -> None:
    total = count(dimension, pulses)
    points = point(torch.arange(total), dimension, pulses)
    assert torch.equal(points.abs().sum(1), torch.full((total,), pulses))
    assert len(torch.unique(points, dim=0)) == total == len(everything(dimension, pulses))
    assert torch.equal(number(points, pulses), torch.arange(total))


@given(SHAPES, st.integers(0, 2**32))
def test_point_round_trip(shape: tuple[int, int], seed: int) -> None:
    dimension, pulses = shape
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(20, dimension, generator=draw) * torch.rand(20, dimension, generator=draw).mul(4).exp()
    y = project(x, pulses)
    assert torch.equal(y.abs().sum(1), torch.full((20,), pulses))
    numbers = number(y, pulses)
    assert max(unsigned(numbers)) < count(dimension, pulses)
    assert torch.equal(point(numbers, dimension, pulses), y)


@given(st.lists(st.integers(0, count(16, 58) - 1), min_size=1, max_size=20))
def test_number_round_trip(values: list[int]) -> None:
    numbers = torch.tensor([v - (1 << 64) if v >> 63 else v for v in values])
    assert torch.equal(number(point(numbers, 16, 58), 58), numbers)
    y = point(torch.tensor([0, count(16, 58) - 1 - (1 << 64)]), 16, 58)
    assert unsigned(number(y, 58)) == [0, count(16, 58) - 1]


def test_bits() -> None:
    assert [most_pulses(16, bits) for bits in (32, 48, 64)] == [12, 27, 58]
    assert count(16, 58).bit_length() == 64
    assert count(3, 4) == len(everything(3, 4))


@pytest.mark.parametrize(("dimension", "pulses"), [(2, 7), (4, 5), (8, 3)])
def test_projection_near_optimal(dimension: int, pulses: int) -> None:
    points = everything(dimension, pulses).float()
    x = torch.randn(500, dimension)
    unit = points / points.norm(dim=1, keepdim=True)
    y = project(x, pulses).float()
    reached = (x * y).sum(1) / y.norm(dim=1)
    best = (x @ unit.T).amax(1)
    assert (reached > best * (1 - 1e-5)).float().mean() > 0.93
    assert ((x.square().sum(1) - reached**2).mean()) < 1.01 * (x.square().sum(1) - best**2).mean()


@pytest.mark.parametrize("pulses", [1, 12, 27, 58])
def test_projection_is_idempotent(pulses: int) -> None:
    y = project(torch.randn(500, 16), pulses)
    gains = torch.rand(500, 1).mul(20).sub(10).exp()
    assert torch.equal(project(y * gains, pulses), y)


def test_zero_vectors() -> None:
    x = torch.zeros(3, 16)
    x[1, 4] = -1e-30
    x[2] = 1e30
    y = project(x, 27)
    assert y[0].tolist() == [27] + [0] * 15
    assert y[1].tolist() == [0] * 4 + [-27] + [0] * 11
    assert sorted(y[2].tolist()) == [1] * 5 + [2] * 11
    assert project(torch.zeros(0, 16), 3).shape == (0, 16)


@pytest.mark.parametrize(("bits", "above", "below"), [(2, 0.075, 0.084), (3, 0.018, 0.020), (4, 0.0040, 0.0045)])
def test_gaussian_error(bits: int, above: float, below: float) -> None:
    """With a gain in float; the best scalar levels have 0.1175, 0.0345, 0.0095."""
    x = torch.randn(3000, 16)
    y = project(x, most_pulses(16, 16 * bits)).float()
    unit = y / y.norm(dim=1, keepdim=True)
    assert above < (x - (x * unit).sum(1, keepdim=True) * unit).square().mean() < below


def test_numbering_is_frozen() -> None:
    """Stored folders depend on it."""
    numbers = torch.arange(0, count(8, 6), 997)
    found = hashlib.sha256(point(numbers, 8, 6).to(torch.int8).numpy().tobytes()).hexdigest()
    assert found == "ad13d82287279eac35a1f2a37967cc8aded593231b04051239ab4c9c97498f17"
    assert point(torch.tensor([123456789012345]), 16, 27)[0].tolist() == [
        2,
        1,
        4,
        2,
        2,
        3,
        0,
        0,
        -2,
        -3,
        2,
        -1,
        -1,
        0,
        -1,
        -3,
    ]
