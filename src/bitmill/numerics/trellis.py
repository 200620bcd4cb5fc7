"""A bitshift trellis: a circular stream of bits whose every window of `state_bits` bits names a level.

A block of 64 numbers is a stream of 64 * bits bits. The state of number t is the window that ends with its bits:

    state_t = stream[bits * (t + 1) - state_bits : bits * (t + 1)]     indices modulo 64 * bits, lowest bit first
    level   = sum of the four bytes of (MULTIPLIER * state + OFFSET mod 2^32) - 510

so that neighbours share bits, every number has 2^bits choices, and all levels together, nearly Gaussian as sums
are, need no table on disk. Levels are integers of RMS 147.8; a level stands for level / 128. The nearest stream is
found by the Viterbi algorithm in integers, `encode`; csrc/vector/viterbi-inl.h gives the same bytes.

The stream is circular (tail-biting). Two searches approximate the best circle: the first takes the state at its
seam from the best path through the 24 numbers on either side, the second cuts the path of the first on the
opposite side, where it keeps the state, and searches the rest again.

Source: QTIP (Tseng et al. 2024, arXiv 2406.11235): bitshift trellis, tail-biting, levels from the bytes of a
linear congruential generator. Constants, block and the second search are this module's own.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 64
MULTIPLIER, OFFSET = 3266489909, 76625531  # the best at 2 bits and 2^12 states of 20 pairs
LARGEST = 510  # level
UNIT = 1 / 128  # of levels, a power of 2 so that products with it are exact
RMS = 147.8 * UNIT
_WINDOW = 24  # numbers on either side of a seam that choose its state
_LIMITS = {1: 31, 2: 45, 3: 52, 4: 63}  # of differences, as in compiled code


@lru_cache(maxsize=16)
def levels(state_bits: int, device: torch.device) -> Tensor:
    """Return the levels of all states, int16 (2^state_bits)."""
    hashed = torch.arange(1 << state_bits, dtype=torch.int64) * MULTIPLIER + OFFSET
    total = sum((hashed >> shift & 255) for shift in (0, 8, 16, 24))
    assert isinstance(total, Tensor)
    return (total - LARGEST).to(torch.int16).to(device)


@lru_cache(maxsize=16)
def points(state_bits: int, device: torch.device) -> Tensor:
    """Return what the levels stand for, fp32 (2^state_bits)."""
    return levels(state_bits, device).float() * UNIT


def fixed_point(x: Tensor) -> Tensor:
    """Return numbers as levels are counted, int16, within the range of levels; NaN becomes 0."""
    return (x / UNIT).nan_to_num(0.0).round().clamp(-LARGEST, LARGEST).to(torch.int16)


def decode(codes: Tensor, bits: int, state_bits: int) -> Tensor:
    """Return the levels of streams.

    Args:
        codes: uint8 (n, 8 * bits).
        bits: of a number.
        state_bits: of a state.

    Returns:
        fp32 (n, BLOCK), levels times UNIT.
    """
    return points(state_bits, codes.device)[states(codes, bits, state_bits)]


def states(codes: Tensor, bits: int, state_bits: int) -> Tensor:
    """Return the states of all numbers, int64 (n, BLOCK); arguments as of `decode`."""
    device = codes.device
    stream = (codes[..., None] >> torch.arange(8, device=device, dtype=torch.uint8) & 1).flatten(1).long()
    state = torch.zeros(len(codes), BLOCK, dtype=torch.int64, device=device)
    for i in range(state_bits):
        end = stream.roll(state_bits - bits - i, 1)  # bit i of the state of number t at index bits * t
        state |= end[:, ::bits] << i
    return state


def encode(x: Tensor, bits: int, state_bits: int, codes: Tensor | None = None, kept: int = 0) -> Tensor:
    """Return the streams of (nearly) least squared error.

    Args:
        x: int16 (n, BLOCK), as returned by `fixed_point`.
        bits: of a number.
        state_bits: of a state.
        codes: present streams, of which the first `kept` numbers, 16 or more, keep their levels.
        kept: a multiple of 16; 0 for new streams.

    Returns:
        Codes uint8 (n, 8 * bits).
    """
    search = _Search(bits, state_bits, x.device)
    backwards = x.flip(1).to(torch.int32)
    if codes is not None and kept:
        return _stream(search.rest(backwards, states(codes, bits, state_bits), kept), bits, state_bits)
    around = backwards.roll(_WINDOW, 1)[:, : 2 * _WINDOW]
    cost, choices = search.forward(
        around, torch.zeros(len(x), 1 << state_bits, dtype=torch.int32, device=x.device)
    )
    best = (cost.long() << state_bits | torch.arange(1 << state_bits, device=x.device)).amin(1)
    start = search.trace(best & ((1 << state_bits) - 1), choices[_WINDOW:])[1]
    path = search.around(backwards, start)
    half = BLOCK // 2
    path = search.around(backwards.roll(-half, 1), path[:, half - 1]).roll(half, 1).flip(1)
    return _stream(path, bits, state_bits)


def _stream(path: Tensor, bits: int, state_bits: int) -> Tensor:
    """Return the codes of states (n, BLOCK)."""
    top = path >> (state_bits - bits)
    stream = (top[..., None] >> torch.arange(bits, device=path.device) & 1).flatten(1).unflatten(1, (-1, 8))
    return (stream << torch.arange(8, device=path.device)).sum(2).to(torch.uint8)


class _Search:
    """Steps from the last number to the first: a state's low bits are the new ones."""

    def __init__(self, bits: int, state_bits: int, device: torch.device) -> None:
        self.bits, self.state_bits = bits, state_bits
        self.levels = levels(state_bits, device).to(torch.int32)
        self.limit, self.shift = _LIMITS[bits], 5 - bits
        self.penalty = -(-state_bits // bits) * self.limit**2 + 1  # more than any detour costs

    def forward(self, x: Tensor, cost: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the least costs of all states after the numbers x (n, steps), and the choices of every step."""
        choices = []
        for t in range(x.shape[1]):
            before = cost.unflatten(1, (1 << self.bits, -1))
            order = torch.arange(1 << self.bits, dtype=torch.int32, device=x.device)[:, None]
            least = (before << self.bits | order).amin(1)  # of equal costs the first
            choices.append((least & ((1 << self.bits) - 1)).long())
            least = (least >> self.bits).repeat_interleave(1 << self.bits, 1)
            distance = (x[:, t, None] + (1 << self.shift >> 1) - self.levels) >> self.shift
            cost = least - least.amin(1, keepdim=True) + distance.clamp(-self.limit, self.limit).square()
        return cost, choices

    def trace(self, state: Tensor, choices: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Follow choices back from a state (n,).

        Returns:
            The states after every step, int64 (n, steps), and the one before the first.
        """
        path = []
        for choice in reversed(choices):
            path.append(state)
            group = state >> self.bits
            state = group | choice.gather(1, group[:, None])[:, 0] << (self.state_bits - self.bits)
        return torch.stack(path[::-1], 1), state

    def around(self, x: Tensor, start: Tensor) -> Tensor:
        """Return the best path (n, BLOCK) that starts and ends in a state (n,)."""
        cost = torch.full((len(x), 1 << self.state_bits), self.penalty, dtype=torch.int32, device=x.device)
        cost.scatter_(1, start[:, None], 0)
        return self.trace(start, self.forward(x, cost)[1])[0]

    def rest(self, x: Tensor, path: Tensor, kept: int) -> Tensor:
        """Search the states (n, BLOCK) after the first `kept` again; the seam stays."""
        start, last = path[:, 0], path[:, kept - 1]
        free = torch.full((len(x), 1 << self.state_bits), self.penalty, dtype=torch.int32, device=x.device)
        cost, choices = self.forward(x[:, : BLOCK - kept], free.scatter_(1, start[:, None], 0))
        high = torch.arange(1 << self.bits, device=x.device) << (self.state_bits - self.bits)
        before = (last >> self.bits)[:, None] | high
        best = (cost.gather(1, before).long() << self.state_bits | before).amin(1)
        found = self.trace(best & ((1 << self.state_bits) - 1), choices)[0]
        return torch.cat([path[:, :kept], found.flip(1)], 1)
