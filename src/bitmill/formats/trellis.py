"""Trellis: 64 weights as one circular stream of bits, whose every window of `state_bits` bits names a level.

    codes  the stream, 64 * bits bits
    scale  fp16, the RMS of a row, by default

    w^ = scale * level(window that ends with the weight's own bits), see `numerics.trellis`

Neighbours share bits, so that a weight has a choice among 2^bits of 2^state_bits levels, and the whole block is
chosen jointly: for Gaussian weights the error comes nearer to the rate-distortion bound than sets of vectors of
practical size do. Levels are computed: there is no codebook. Made for weights in a rotated basis. Bits a weight:
bits + 16/columns.

More `state_bits` lower the error, and double the time of encoding each; decoding costs the same.

Source: QTIP (Tseng et al. 2024, arXiv 2406.11235). There a stream runs over 16 rows by 16 columns; here over 64
columns of one row, so that rows decode alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bitmill import native
from bitmill.errors import RecipeError
from bitmill.formats.base import FORMATS, Params, Rounder
from bitmill.formats.fitting import divide_or_zero
from bitmill.formats.vector import VectorFormat
from bitmill.numerics import trellis
from bitmill.numerics.packing import pack

_SET = 2  # of the compiled vector sets
_GAINS = {1: 0.95, 2: 1.02, 3: 1.12, 4: 1.15}  # of levels over weights, by bits: the least error at 2^12 states
_STEP = 16  # columns between two searches of a block
_SLICE = 1 << 22  # states at a time in torch


@FORMATS.register("trellis")
@dataclass(frozen=True)
class Trellis(VectorFormat):
    """A path through a bitshift trellis; `bits` 1 to 4, `state_bits` 8 to 16."""

    state_bits: int = 12

    block: ClassVar[int] = trellis.BLOCK
    feeds_inside: ClassVar[bool] = True
    max_bits: ClassVar[int] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 8 <= self.state_bits <= 16:
            raise RecipeError(f"state_bits is {self.state_bits!r}; use 8 to 16.")

    @property
    def rms(self) -> float:  # type: ignore[override]
        """RMS of the numbers that the levels suit best: narrower ones at more bits, so that the range suffices."""
        return trellis.RMS / _GAINS[self.bits]

    @property
    def code_bits(self) -> int:
        """Bits of a code, a byte of the stream."""
        return 8

    @property
    def codes_per_block(self) -> int:
        """The bytes of a stream."""
        return self.block * self.bits // 8

    def encode(self, x: Tensor) -> Tensor:
        """Return the stream of (nearly) least squared error, by the Viterbi algorithm."""
        return self._encoded(x, None, 0)

    def rounder(self, params: Params) -> Rounder:
        """Return a function that encodes one block of columns, and with U feeds errors on inside it.

        After every 16 columns the rest of the path is searched again, for columns that have absorbed their errors.
        """
        scale = params["scale"][:, 0, None]

        def block(w: Tensor, U: Tensor | None = None) -> tuple[Tensor, Tensor]:
            x = divide_or_zero(w, scale)
            codes = self.encode(x)
            for stop in range(_STEP, self.block, _STEP) if U is not None else ():
                assert U is not None
                here = slice(stop - _STEP, stop)
                error = x[:, here] - self.points(codes)[:, here]
                error = torch.linalg.solve_triangular(U[here, here].T, error.T, upper=False).T
                x = torch.cat([x[:, :stop], x[:, stop:] - error @ U[here, stop:]], 1)
                codes = self._encoded(x, codes, stop)
            return codes, self.points(codes) * scale

        return block

    def _encoded(self, x: Tensor, codes: Tensor | None, kept: int) -> Tensor:
        numbers = trellis.fixed_point(x)
        if _is_compiled(x):
            codes = (
                x.new_empty(len(x), self.codes_per_block, dtype=torch.uint8) if codes is None else codes.clone()
            )
            levels = trellis.levels(self.state_bits, x.device)
            native.native().trellis_codes(self.bits, levels, numbers.contiguous(), codes, kept, native.threads())
            return codes
        return self._encode_in_torch(numbers, codes, kept)

    def points(self, codes: Tensor) -> Tensor:
        """Return the levels of a stream."""
        if _is_compiled(codes):
            out = torch.empty(len(codes), self.block)
            words, ones = pack(codes, self.code_bits), torch.ones(1, 1)
            levels = trellis.points(self.state_bits, codes.device)
            native.native().vector_decode(
                _SET, self.block, self.bits, words, ones, levels, 0, out, native.threads()
            )
            return out
        return trellis.decode(codes, self.bits, self.state_bits)

    def _encode_in_torch(self, numbers: Tensor, codes: Tensor | None = None, kept: int = 0) -> Tensor:
        size = max(1, _SLICE >> self.state_bits)
        pieces = numbers.split(size)
        present: Sequence[Tensor | None] = [None] * len(pieces) if codes is None else codes.split(size)
        each = zip(pieces, present)
        coded = [trellis.encode(x, self.bits, self.state_bits, part, kept) for x, part in each if len(x)]
        return torch.cat(coded) if coded else numbers.new_zeros(0, self.codes_per_block, dtype=torch.uint8)


def _is_compiled(x: Tensor) -> bool:
    return len(x) > 0 and x.device.type == "cpu" and native.unsupported_reason("trellis_codes") is None
