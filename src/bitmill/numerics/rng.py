"""Random numbers that depend on a seed alone, on every machine and under every version of torch.

Signs, permutations and rotations that a quantized folder derives from a seed are part of its meaning, so they
must not depend on a library's generator. Word i of a seed is splitmix64 at counter i (Steele, Lea and
Flood 2014, "Fast splittable pseudorandom number generators", section 5): integers alone, in numpy's
uint64, whose products wrap by definition.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_Words = npt.NDArray[np.uint64]


def words(seed: int, stream: int, count: int) -> _Words:
    """Return 64-bit words, (count,).

    Args:
        seed: any integer, reduced to 64 bits.
        stream: different streams of one seed are unrelated.
        count: number of words.
    """
    start = _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], np.uint64))
    start = _mix(start + np.uint64(stream))
    return _mix(start + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def signs(seed: int, stream: int, count: int) -> Tensor:
    """Return random signs, (count,) fp32, each 1 or -1.

    Args:
        seed, stream, count: as of `words`.
    """
    top = words(seed, stream, count) >> np.uint64(63)
    return torch.from_numpy(1.0 - 2.0 * top.astype(np.float32))


def permutation(seed: int, stream: int, count: int) -> Tensor:
    """Return a random permutation of the numbers below `count`, (count,) int64.

    Args:
        seed, stream, count: as of `words`.
    """
    return torch.from_numpy(np.argsort(words(seed, stream, count), kind="stable"))


def normals(seed: int, stream: int, count: int) -> Tensor:
    """Return standard normal numbers, (count,) fp64, by Box and Muller.

    They are equal on all machines up to the last digit of log and cos.

    Args:
        seed, stream, count: as of `words`.
    """
    pairs = (count + 1) // 2
    uniform = (words(seed, stream, 2 * pairs) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    radius = np.sqrt(-2 * np.log1p(-uniform[:pairs]))
    angle = 2 * np.pi * uniform[pairs:]
    return torch.from_numpy(np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count])


def _mix(z: _Words) -> _Words:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
