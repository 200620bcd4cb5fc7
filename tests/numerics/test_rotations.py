"""Rotations: orthogonal on every width, incoherent, reproducible."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitmill.numerics.hadamard import hadamard
from bitmill.numerics.rng import normals, permutation, signs, words
from bitmill.numerics.rotations import hartley, rotation

KINDS = ["hadamard", "orthogonal"]
every_kind = pytest.mark.parametrize("kind", KINDS)
# one, primes, ragged, widths of real models
WIDTHS = [1, 2, 3, 7, 12, 52, 97, 191, 500, 576, 577, 896, 1009, 1536, 4 * 3 * 43]


def matrix(kind: str, width: int, seed: int = 0) -> torch.Tensor:
    """V, whose columns are the images of the unit vectors."""
    return rotation(kind, width, seed).forward(torch.eye(width)).T


@every_kind
@pytest.mark.parametrize("width", WIDTHS)
def test_orthogonal_and_inverse(kind: str, width: int) -> None:
    V = matrix(kind, width)
    assert (V @ V.T - torch.eye(width)).abs().max() < 3e-6
    x = torch.randn(2, 3, width)
    turned = rotation(kind, width, 0)
    assert torch.allclose(turned.forward(x), x @ V.T, atol=1e-5)
    assert (turned.inverse(turned.forward(x)) - x).norm() < 2e-6 * x.norm()
    assert torch.allclose(
        turned.congruent(torch.outer(x[0, 0], x[0, 1])), torch.outer(V @ x[0, 0], V @ x[0, 1]), atol=1e-4
    )


@given(st.integers(1, 400), st.sampled_from(KINDS), st.integers(0, 2**64))
def test_any_width_and_seed(width: int, kind: str, seed: int) -> None:
    x = torch.randn(4, width)
    turned = rotation(kind, width, seed)
    y = turned.forward(x)
    assert torch.allclose(y @ y.T, x @ x.T, rtol=1e-4, atol=1e-4)
    assert torch.allclose(turned.inverse(y), x, atol=1e-5)


@pytest.mark.parametrize("width", WIDTHS)
def test_hadamard_is_incoherent(width: int) -> None:
    assert matrix("hadamard", width).abs().max() <= (2 / width) ** 0.5 * (1 + 1e-5)


@pytest.mark.parametrize("width", [1, 2, 8, 12, 20, 24, 28, 576, 896, 1280, 1536, 4864, 14336])
def test_hadamard_widths_are_flat(width: int) -> None:
    image = rotation("hadamard", width, 0).forward(torch.eye(width)[:3])
    assert torch.allclose(image.abs(), torch.tensor(width**-0.5), rtol=1e-4)


@every_kind
@pytest.mark.parametrize("width", [191, 576, 577])
def test_outlier_is_spread(kind: str, width: int) -> None:
    """Incoherence (QuIP, lemma 5): the largest entry of a rotated spike is above the RMS by logarithms alone."""
    spike = torch.zeros(1, width)
    spike[0, 3] = 1.0
    image = rotation(kind, width, 1).forward(spike)
    assert image.abs().max() <= 8 * width**-0.5


@every_kind
def test_seeds_differ(kind: str) -> None:
    one, other = matrix(kind, 96, 0), matrix(kind, 96, 1)
    assert (one - other).abs().max() > 0.05
    assert torch.equal(one, matrix(kind, 96, 0))


@every_kind
def test_gradients_after_inference(kind: str) -> None:
    with torch.inference_mode():
        rotation(kind, 84, 5).forward(torch.randn(2, 84))
    x = torch.randn(2, 84, requires_grad=True)
    rotation(kind, 84, 5).forward(x).square().sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, 2 * x, atol=1e-4)


def test_half_precision_upcast() -> None:
    x = torch.randn(2, 96)
    turned = rotation("hadamard", 96, 0)
    assert turned.forward(x.to(torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 24, 28, 36, 44, 60, 76, 140])
def test_hadamard_matrices(order: int) -> None:
    H = hadamard(order)
    assert H is not None
    assert torch.equal(H.abs(), torch.ones(order, order))
    assert torch.equal(H @ H.T, order * torch.eye(order))


@pytest.mark.parametrize("order", [3, 6, 10, 52, 92])
def test_unknown_orders(order: int) -> None:
    assert hadamard(order) is None


@pytest.mark.parametrize("width", [1, 2, 5, 128, 129, 257])
def test_hartley_is_involution(width: int) -> None:
    x = torch.randn(3, width)
    assert torch.allclose(hartley(hartley(x)), x, atol=1e-5)
    index = torch.arange(width)
    turns = 2 * torch.pi * (index[:, None] * index % width) / width
    direct = (turns.cos() + turns.sin()) / width**0.5
    assert torch.allclose(hartley(x), x @ direct, atol=1e-5)


def test_draws_are_frozen() -> None:
    """Stored folders depend on these numbers: they may never change."""
    assert [hex(w) for w in words(7, 2, 3).tolist()] == FROZEN_WORDS
    assert signs(7, 0, 12).tolist() == FROZEN_SIGNS
    assert permutation(7, 0, 10).tolist() == FROZEN_ORDER
    assert torch.allclose(normals(7, 0, 3), torch.tensor(FROZEN_NORMALS, dtype=torch.float64), rtol=1e-14)
    weights = torch.arange(1.0, 25.0)
    for kind, expected in FROZEN_IMAGES.items():
        image = rotation(kind, 24, 7).forward(weights)[:4]
        assert torch.allclose(image, torch.tensor(expected), rtol=0, atol=1e-5)


def test_draws_look_random() -> None:
    assert abs(float(signs(0, 0, 40000).mean())) < 0.02
    assert abs(float((signs(0, 0, 40000) * signs(0, 1, 40000)).mean())) < 0.02
    assert sorted(permutation(3, 1, 1000).tolist()) == list(range(1000))
    x = normals(0, 0, 40001)
    assert abs(float(x.mean())) < 0.02
    assert abs(float(x.square().mean()) - 1) < 0.03
    assert abs(float(x.pow(4).mean()) - 3) < 0.15


FROZEN_WORDS = ["0x80853b1f0e8fecb8", "0xd8b1bdd9bc8d664d", "0xb4ce0bb41546ba06"]
FROZEN_SIGNS = [-1.0, 1.0, -1.0, 1.0, -1.0, -1.0, -1.0, -1.0, -1.0, 1.0, 1.0, -1.0]
FROZEN_ORDER = [9, 1, 3, 8, 5, 0, 6, 2, 7, 4]
FROZEN_NORMALS = [0.9885315396218438, -1.0270831165641678, -1.212254493220296]
FROZEN_IMAGES = {
    "hadamard": [-4.490731, -15.921682, -10.206207, -2.041241],
    "orthogonal": [-13.94186, -8.412645, 4.112792, -34.287189],
}
