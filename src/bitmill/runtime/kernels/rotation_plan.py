"""Rotations as chains of steps that the compiled kernel runs (csrc/rotation/rotation.h).

Sylvester's matrices inside the small factors become additions: a factor A (x) H, H of order 2**k, is A along one
axis and k rounds of butterflies along the next. The remaining matrices (Paley's, Hartley's, random ones) are
multiplied.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod, sqrt

import torch
from torch import Tensor

from bitmill.numerics.hadamard import hadamard
from bitmill.numerics.rotations import Kronecker, Permutation, Rotation, Signs
from bitmill.runtime import ops

_LANES = 16
_MULTIPLY, _PERMUTE, _BUTTERFLIES, _MATRIX = range(4)  # csrc/rotation/rotation.h: Turn

NOTHING = (
    torch.empty(0, 6, dtype=torch.int64),
    torch.empty(0),
    torch.empty(0, dtype=torch.int32),
)  # parts of the identity


class RotationPlan:
    """A rotation or its inverse, all factors of which are matrices."""

    def __init__(self, rotation: Rotation, inverse: bool) -> None:
        self._steps: list[tuple[int, int, int, int, int, int]] = []
        self._numbers: list[Tensor] = []
        self._orders: list[Tensor] = []
        width = rotation.width
        for step in reversed(rotation.steps) if inverse else rotation.steps:
            if isinstance(step, Signs):
                self._add(_MULTIPLY, 0, width, 1, 1, step.signs)
            elif isinstance(step, Permutation):
                self._add(_PERMUTE, 0, width, 1, 1, step.back if inverse else step.order)
            else:
                self._kronecker(step, inverse)
        steps = torch.tensor(self._steps, dtype=torch.int64).reshape(-1, 6)
        self.parts = (steps, _joined(self._numbers, torch.float32), _joined(self._orders, torch.int32))

    def apply(self, x: Tensor) -> Tensor:
        """Rotate x (tokens, width) fp32; returns a new tensor."""
        return ops.rotate(x, *self.parts)

    def _kronecker(self, step: Kronecker, inverse: bool) -> None:
        factors = [factor for factor in step.factors if isinstance(factor, Tensor)]
        inner = width = prod(len(F) for F in factors)
        scale = 1.0
        for F in factors:
            rest, order = _without_sylvester(F.T if inverse else F)
            inner //= len(F)
            if len(rest) > 1:
                self._matrix(rest, step.start, width, inner * order)
            else:
                scale *= float(rest.sign())  # a random factor of one axis may be -1
            scale *= self._sylvester(order, step.start, width, inner)
        if scale != 1:
            self._add(_MULTIPLY, step.start, width, 1, 1, torch.full((width,), scale))

    def _sylvester(self, order: int, start: int, width: int, inner: int) -> float:
        """Add the product with Sylvester's matrix along an axis; returns the factor that remains to be applied.

        order: of the matrix.  start, width: columns that the step covers.  inner: elements of an axis step.
        """
        dense = order if inner % _LANES else 1  # within a vector lanes are multiplied; whole vectors are added
        while inner == 1 and dense > _LANES:
            dense //= 2
        if dense > 1:
            H = hadamard(dense)
            assert H is not None
            self._matrix(H / dense**0.5, start, width, inner)
        if order > dense:
            self._add(_BUTTERFLIES, start, width, order // dense, inner * dense)
        return (order // dense) ** -0.5

    def _matrix(self, F: Tensor, start: int, width: int, inner: int) -> None:
        numbers = torch.nn.functional.pad(F.T, (0, -len(F) % _LANES)).flatten()
        self._add(_MATRIX, start, width, len(F), inner, numbers)

    def _add(
        self, kind: int, start: int, width: int, order: int, inner: int, values: Tensor | None = None
    ) -> None:
        held = self._orders if kind == _PERMUTE else self._numbers
        self._steps.append((kind, start, width, order, inner, sum(len(v) for v in held)))
        if values is not None:
            held.append(values)


@lru_cache(maxsize=128)
def rotation_plan(rotation: Rotation, inverse: bool) -> RotationPlan | None:
    """Return the plan of a rotation, shared by all layers of a width.

    Args:
        rotation: The rotation.
        inverse: Return the plan of its inverse.

    Returns:
        None for rotations with a Fourier transform, which torch computes.
    """
    kronecker = [step for step in rotation.steps if isinstance(step, Kronecker)]
    if any(isinstance(factor, int) for step in kronecker for factor in step.factors):
        return None
    return RotationPlan(rotation, inverse)


def _without_sylvester(F: Tensor) -> tuple[Tensor, int]:
    """Return (A, order) with F = A (x) Sylvester's orthogonal matrix of the largest possible order."""
    order = 1
    while len(F) % 2 == 0:
        a = F[::2, ::2]
        if not (torch.equal(a, F[::2, 1::2]) and torch.equal(a, F[1::2, ::2]) and torch.equal(a, -F[1::2, 1::2])):
            break
        F, order = a * sqrt(2), order * 2
    return F, order


def _joined(values: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat(values).to(dtype) if values else torch.empty(0, dtype=dtype)
