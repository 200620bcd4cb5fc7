"""Hadamard matrices: entries 1 and -1, orthogonal rows.

Sylvester's construction doubles; Paley's two reach 12, 20, 28, 36, 44, 60, ... from the quadratic residues of
a prime, so no table of matrices is shipped. The matrix of a given order is part of stored folders:
constructions may be added for orders that have none, never changed.

Paley 1933, "On orthogonal matrices".
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def hadamard(order: int) -> Tensor | None:
    """Return the matrix of an order, fp32 of 1 and -1; None where no construction reaches (the first is 52)."""
    if order & (order - 1) == 0:
        return _sylvester(order)
    if order % 4 == 0 and _is_prime(order - 1):
        return _skew(order - 1)
    if order % 4 == 0 and _is_prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        return _symmetric(order // 2 - 1)
    return None


def _sylvester(order: int) -> Tensor:
    H = torch.ones(1, 1)
    while H.shape[0] < order:
        H = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), H)
    return H


def _skew(q: int) -> Tensor:
    """Build Paley's first matrix, I + S of order q + 1, S skew, for a prime q = 3 mod 4."""
    S = torch.zeros(q + 1, q + 1)
    S[0, 1:], S[1:, 0] = 1.0, -1.0
    S[1:, 1:] = _residues(q)
    return S + torch.eye(q + 1)


def _symmetric(q: int) -> Tensor:
    """Build Paley's second matrix, of order 2 (q + 1), for q = 1 mod 4: symmetric S, blocks for zeros and ones."""
    S = torch.zeros(q + 1, q + 1)
    S[0, 1:] = S[1:, 0] = 1.0
    S[1:, 1:] = _residues(q)
    ones, zeros = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    return torch.kron(S, ones) + torch.kron(torch.eye(q + 1), zeros)


def _residues(q: int) -> Tensor:
    """Build Jacobsthal's matrix: entry (i, j) is 1 where j - i is a square modulo q, -1 elsewhere, 0 at 0."""
    character = torch.full((q,), -1.0)
    character[torch.arange(1, q).square() % q] = 1.0
    character[0] = 0.0
    index = torch.arange(q)
    return character[(index[None, :] - index[:, None]) % q]


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))
