"""Orthogonal maps of any width that cost far less than width**2, each determined by a seed.

A weight matrix W (out, in) in a random orthogonal basis, U W V^T, is incoherent: its largest entry is
little above its RMS despite any outliers of W, so that few levels serve it well. A rotation is a chain of
steps on the last axis:

    signs            x_i -> s_i x_i
    permutation      x_i -> x_p(i)
    kronecker        the x of a window, reshaped (a, b, ...), times one small orthogonal matrix along each axis

hadamard(width)      signs, then Sylvester's matrices for the powers of two, Paley's for odd primes p with a
                     matrix of order 4p, Hartley's for the rest. Largest entry 1/sqrt(width), at most
                     sqrt(2/width) with a Hartley factor. O(width log width).
orthogonal(width)    permutation, two Haar-random factors of about sqrt(width), permutation. A width without
                     such factors takes two overlapping windows of a width that has them. O(width**1.5).

A seed always means one and the same map (`rng`). QuIP (arXiv 2307.13304, section 4.1) has the Kronecker product,
QuIP# (arXiv 2402.04396, section 3) the randomized Hadamard transform.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import isqrt, prod
from typing import Literal

import torch
from torch import Tensor

from bitmill.numerics.hadamard import hadamard
from bitmill.numerics.rng import normals, permutation, signs

Kind = Literal["hadamard", "orthogonal"]

_SMALL = 64  # factors are joined up to this order: a product with it is as fast as its six butterflies
_PALEY = 1024  # larger odd primes are left to the Fourier transform
_DENSE = 128  # Hartley factors up to this order are multiplied, larger ones go through the Fourier transform


@dataclass(frozen=True, eq=False)
class Kronecker:
    """The Kronecker product of small orthogonal matrices on x[..., start : start + prod(orders)]."""

    start: int
    factors: tuple[Tensor | int, ...]  # a matrix, or the order of a Hartley transform

    def apply(self, x: Tensor, inverse: bool) -> Tensor:
        """Multiply by the product, or its transpose.

        Args:
            x: fp32 (..., width).
            inverse: apply the transpose.

        Returns:
            fp32 (..., width).
        """
        orders = [f if isinstance(f, int) else f.shape[0] for f in self.factors]
        width = prod(orders)
        y = x[..., self.start : self.start + width]
        lead = y.shape[:-1]
        for order, factor in zip(orders, self.factors):
            # the first axis is moved last, transformed and left there: after all factors the order is as before
            y = y.reshape(*lead, order, width // order).transpose(-1, -2)
            # Hartley's transform is its own inverse, a matrix is undone by its transpose
            y = hartley(y) if isinstance(factor, int) else y @ (factor if inverse else factor.T)
            y = y.reshape(*lead, width)
        if width == x.shape[-1]:
            return y
        return torch.cat([x[..., : self.start], y, x[..., self.start + width :]], -1)


@dataclass(frozen=True, eq=False)
class Signs:
    """Multiplication by signs."""

    signs: Tensor

    def apply(self, x: Tensor, inverse: bool) -> Tensor:
        """Multiply x (..., width) by the signs, their own inverse."""
        return x * self.signs


@dataclass(frozen=True, eq=False)
class Permutation:
    """The permutation x[..., order]."""

    order: Tensor
    back: Tensor

    def apply(self, x: Tensor, inverse: bool) -> Tensor:
        """Permute the last axis of x (..., width), or undo it with `inverse`."""
        return x.index_select(-1, self.back if inverse else self.order)


Step = Kronecker | Signs | Permutation


@dataclass(frozen=True, eq=False)
class Rotation:
    """An orthogonal matrix V (width, width) as a chain of cheap steps."""

    width: int
    steps: tuple[Step, ...]

    def forward(self, x: Tensor) -> Tensor:
        """Apply V to every vector on the last axis: x (..., width) to x V^T, fp32."""
        x = x.to(torch.float32)
        for step in self.steps:
            x = step.apply(x, False)
        return x

    def inverse(self, x: Tensor) -> Tensor:
        """Undo `forward`: x (..., width) to x V, fp32."""
        x = x.to(torch.float32)
        for step in reversed(self.steps):
            x = step.apply(x, True)
        return x

    def congruent(self, gram: Tensor) -> Tensor:
        """Return V G V^T for G (width, width), symmetric or not."""
        return self.forward(self.forward(gram).T).T


@lru_cache(maxsize=64)
def rotation(kind: Kind, width: int, seed: int, device: torch.device | str = "cpu") -> Rotation:
    """Return the rotation of a seed. Cached: the layers of a model share a few widths.

    Args:
        kind: "hadamard" or "orthogonal".
        width: of the vectors.
        seed: any integer.
        device: of the tensors.
    """
    with torch.inference_mode(False):  # the cached tensors must serve training too
        made = _hadamard_steps(width, seed) if kind == "hadamard" else _orthogonal_steps(width, seed)
        return Rotation(width, tuple(_moved(step, torch.device(device)) for step in made))


def hartley(x: Tensor) -> Tensor:
    """Apply the orthonormal Hartley transform to the last axis: symmetric, real, its own inverse, any length.

    Entry (j, k) is sqrt(2/n) cos(2 pi jk/n - pi/4), so no entry exceeds sqrt(2/n).
    """
    n = x.shape[-1]
    if n <= _DENSE:
        return x @ _hartley_matrix(n).to(x.device)
    spectrum = torch.fft.fft(x, norm="ortho")
    return spectrum.real - spectrum.imag


@lru_cache(maxsize=64)
def _hartley_matrix(n: int) -> Tensor:
    index = torch.arange(n)
    turns = (index[:, None] * index % n).to(torch.float64) / n
    return ((2 * torch.pi * turns - torch.pi / 4).cos() * (2 / n) ** 0.5).to(torch.float32)


def _hadamard_steps(width: int, seed: int) -> list[Step]:
    odd, twos = width, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    matrices: list[Tensor] = []
    rest = 1
    for prime in _primes(odd):
        H = hadamard(4 * prime) if twos >= 2 and 4 * prime <= _PALEY else None
        if H is None:
            rest *= prime
        else:
            matrices.append(H / (4 * prime) ** 0.5)
            twos -= 2
    if 1 < rest <= _DENSE:
        matrices.append(_hartley_matrix(rest))
    while twos:
        order = min(_SMALL, 1 << twos)
        H = hadamard(order)
        assert H is not None
        matrices.append(H / order**0.5)
        twos -= order.bit_length() - 1
    factors: list[Tensor | int] = list(_merged(matrices))
    if rest > _DENSE:
        factors.append(rest)
    return [Signs(signs(seed, 0, width)), Kronecker(0, tuple(factors))]


def _merged(matrices: list[Tensor]) -> list[Tensor]:
    """Join matrices whose product stays small: few medium products are faster than many tiny ones."""
    merged: list[Tensor] = []
    for small in sorted(matrices, key=lambda m: -m.shape[0]):
        for i, large in enumerate(merged):
            if large.shape[0] * small.shape[0] <= _SMALL:
                merged[i] = torch.kron(large, small)
                break
        else:
            merged.append(small)
    return merged


def _orthogonal_steps(width: int, seed: int) -> list[Step]:
    root = isqrt(width)
    short = next(d for d in range(root, 0, -1) if width % d == 0)
    if width // short > 8 * (root + 1):  # no two factors near the root: windows of root**2 on both ends
        starts, orders = [0, width - root * root], (root, root)
    else:
        starts, orders = [0], (short, width // short)
    steps: list[Step] = []
    for turn, start in enumerate(starts):
        steps.append(_shuffle(seed, 4 * turn + 1, width))
        steps.append(Kronecker(start, tuple(_haar(seed, 4 * turn + 2 + i, n) for i, n in enumerate(orders))))
    return [*steps, _shuffle(seed, 0, width)]


def _shuffle(seed: int, stream: int, width: int) -> Permutation:
    order = permutation(seed, stream, width)
    return Permutation(order, torch.argsort(order))


def _haar(seed: int, stream: int, order: int) -> Tensor:
    """Return a Haar-random orthogonal matrix: Q of the one QR with a positive diagonal of R."""
    Q, R = torch.linalg.qr(normals(seed, stream, order * order).reshape(order, order))
    return (Q * R.diagonal().sign()).to(torch.float32)


def _primes(n: int) -> list[int]:
    """Return the prime factors of n, smallest first."""
    found, divisor = [], 2
    while n > 1:
        while n % divisor == 0:
            found.append(divisor)
            n //= divisor
        divisor += 1 if divisor * divisor <= n else max(1, n - divisor)
    return found


def _moved(step: Step, device: torch.device) -> Step:
    if isinstance(step, Signs):
        return Signs(step.signs.to(device))
    if isinstance(step, Permutation):
        return Permutation(step.order.to(device), step.back.to(device))
    return Kronecker(step.start, tuple(f if isinstance(f, int) else f.to(device) for f in step.factors))
