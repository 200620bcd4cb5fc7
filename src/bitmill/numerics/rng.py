"""Random numbers that are a function of a seed for ever, on every machine and under every version of torch.

What a quantized folder derives from a seed (signs, permutations, rotations) is part of its meaning, so it
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
    """(count,) 64-bit words; different streams of one seed are unrelated."""
    start = _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], np.uint64))
    start = _mix(start + np.uint64(stream))
    return _mix(start + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def signs(seed: int, stream: int, count: int) -> Tensor:
    """(count,) fp32, each 1 or -1."""
    top = words(seed, stream, count) >> np.uint64(63)
    return torch.from_numpy(1.0 - 2.0 * top.astype(np.float32))


def permutation(seed: int, stream: int, count: int) -> Tensor:
    """(count,) int64, every number below `count` once."""
    return torch.from_numpy(np.argsort(words(seed, stream, count), kind="stable"))


def normals(seed: int, stream: int, count: int) -> Tensor:
    """(count,) fp64, standard normal (Box and Muller), equal everywhere up to the last digit of log and cos."""
    pairs = (count + 1) // 2
    uniform = (words(seed, stream, 2 * pairs) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    radius = np.sqrt(-2 * np.log1p(-uniform[:pairs]))
    angle = 2 * np.pi * uniform[pairs:]
    return torch.from_numpy(np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count])


def _mix(z: _Words) -> _Words:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
