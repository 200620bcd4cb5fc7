"""Codes in lanes: the layout of `lut`, made once when a layer is first used.

A packed row is one stream of `bits`-bit codes in 32-bit words: codes cross words, and groups begin anywhere. On a
GPU each thread should read whole words on its own, and neighbouring threads neighbouring words. So 32 codes of one
group, which fill exactly `bits` words at every width from 1 to 8, form a lane, and the words j of a row's lanes
are contiguous:

    words    int32 (rows, bits, lanes);  code i of a lane occupies bits i*bits ... of its `bits` words
    lanes    whole ones for every group: ceil(width / 32) of them; only groups of another width than a multiple
             of 32 are padded, with code 0
    stride   code i of lane l is column i * stride + l % stride of its 32 * stride columns. Threads that hold
             neighbouring lanes then multiply their code i with neighbouring inputs. The largest power of two up to
             32 that divides the lanes of a group

Only that padding adds bits. Planes are the analogue for binary codings: word i of a lane holds bit i
of its 32 codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bitmill.numerics.packing import pack, unpack

Codes = Callable[[Tensor, int, int], Tensor]

LANE = 32
_SLICE = 1 << 24  # codes repacked at a time, some 0.3 GB of temporaries


def lanes_per_group(width: int) -> int:
    """Return the number of lanes that hold `width` columns."""
    return -(-width // LANE)


def stride_of(width: int) -> int:
    """Return the columns between neighbouring codes of a lane."""
    lanes = lanes_per_group(width)
    return min(LANE, lanes & -lanes)


def lanes_in(columns: int, width: int) -> int:
    """Return the number of lanes of a row."""
    return -(-columns // width) * lanes_per_group(width)


def to_lanes(packed: Tensor, bits: int, columns: int, width: int) -> Tensor:
    """Repack codes in lanes.

    Args:
        packed: int32 (rows, words), packed codes.
        bits: Bits of a code.
        columns: Columns of a row.
        width: Columns of a group.

    Returns:
        int32 (rows, bits, lanes).
    """
    rows, stride, lanes = packed.shape[0], stride_of(width), lanes_in(columns, width)
    out = packed.new_empty(rows, bits, lanes)
    for cut in _slices(rows, columns):
        codes = unpack(packed[cut], bits, columns)
        codes = _padded(_padded(codes, width).unflatten(1, (-1, width)), lanes_per_group(width) * LANE).flatten(1)
        codes = codes.unflatten(1, (-1, LANE, stride)).transpose(2, 3).reshape(-1, lanes, LANE)
        out[cut] = pack(codes, bits).transpose(1, 2)
    return out


def to_planes(packed: Tensor, bits: int, columns: int, width: int) -> Tensor:
    """Repack codes in planes: as `to_lanes`, but word i of a lane holds bit i of its codes.

    Args:
        packed: int32 (rows, words), packed codes.
        bits: Bits of a code.
        columns: Columns of a row.
        width: Columns of a group.

    Returns:
        int32 (rows, bits, lanes).
    """
    out = packed.new_empty(packed.shape[0], bits, lanes_in(columns, width))
    for cut in _slices(packed.shape[0], columns):
        codes = unpack(packed[cut], bits, columns)
        planes = [to_lanes(pack(codes >> i & 1, 1), 1, columns, width) for i in range(bits)]
        out[cut] = torch.cat(planes, 1)
    return out


def codes_of_planes(words: Tensor, columns: int, width: int) -> Tensor:
    """Unpack codes whose bits are in planes, each in lanes of single bits.

    Args:
        words: int32 (rows, bits, lanes), a plane for each bit.
        columns: Columns of a row.
        width: Columns of a group.

    Returns:
        uint8 (rows, columns).
    """
    planes = [codes_of_lanes(words[:, i : i + 1], columns, width) << i for i in range(words.shape[1])]
    return torch.stack(planes).sum(0, dtype=torch.uint8)


def from_words(words: Tensor, columns: int, width: int, unpack_rows: Codes) -> Tensor:
    """Pack codes in lanes or planes again, bit by bit as they were.

    Args:
        words: int32 (rows, bits, lanes).
        columns: Columns of a row.
        width: Columns of a group.
        unpack_rows: `codes_of_lanes` or `codes_of_planes`.

    Returns:
        int32 (rows, words).
    """
    bits = words.shape[1]
    slices = _slices(words.shape[0], columns)
    return torch.cat([pack(unpack_rows(words[cut], columns, width), bits) for cut in slices])


def codes_of_lanes(words: Tensor, columns: int, width: int) -> Tensor:
    """Unpack codes of whole bits in lanes.

    Args:
        words: int32 (rows, bits, lanes).
        columns: Columns of a row.
        width: Columns of a group.

    Returns:
        uint8 (rows, columns).
    """
    stride, lanes = stride_of(width), words.shape[2]
    codes = unpack(words.transpose(1, 2), words.shape[1], LANE)
    codes = codes.reshape(-1, lanes // stride, stride, LANE).transpose(2, 3).flatten(1)
    return codes.unflatten(1, (-1, lanes_per_group(width) * LANE))[..., :width].flatten(1)[:, :columns]


def _padded(codes: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(codes, (0, -codes.shape[-1] % multiple))


def _slices(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _SLICE // columns)
    return (slice(start, start + step) for start in range(0, rows, step))
