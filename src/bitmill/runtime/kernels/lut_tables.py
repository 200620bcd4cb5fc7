"""Tables of a scalar format as the lookup kernels hold them: unsigned bytes, 16-bit numbers in two bytes, or fp32.

    W^ = row_scale * scale * (table[code] - zero)

Exact where all entries are multiples of one power of two within the range (codes, codings, e2m1, e2m3). Other
tables are rounded, each with a step of its own: no entry then moves by more than 1/254 of the table's largest
magnitude in one byte, 1/65534 in two. Tables of rows or groups that are their own negative, read backwards (binary
coding without an offset), are stored by half.

Numbers of a row's groups are laid out tile by tile, as (tiles, groups, rows of a tile): csrc/lut/layout.h.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bitmill.formats import Lookup

Tiled = Callable[[Tensor], Tensor]
Entries = Literal["bytes", "words", "floats"]

SHARED, OWN, BANK = 0, 1, 2  # csrc/lut/kernel.h: Source
_BANK_TABLES, _BANK_POWERS, _BANK_MOST = 32, 16, 63  # tables, powers, and the largest entry
_HALVED = (3, 4)  # bits of tables that can be stored by half
_SUMMED = 4  # bits of tables that can be looked up as sums
_WHOLE_FROM = 5  # bits from which a table fills a vector, and a tile is one row


@dataclass
class ByteTables:
    """What the kernels read besides the codes."""

    rows_per_tile: int
    group_blocks: int
    source: int
    wide: bool
    tables: Tensor  # uint8
    record_bytes: int
    records_per_tile: int  # 0 shared, 1 a row, or one a group
    zero: float
    row_scales: Tensor  # fp32 (tiles * rows of a tile,)
    scales: Tensor | None = None  # fp16 or fp32
    zeros: Tensor | None = None  # uint8 or fp16
    ids: Tensor | None = None  # uint8
    powers: Tensor | None = None
    bank_bits: int = 0
    mirrored: bool = False
    is_exact: bool = False  # tables hold the format's own levels, not rounded ones


def rows_per_tile(bits: int, source: int) -> int:
    """16 where a vector holds 16 rows' tables or one table serves all, else 4 or 1."""
    if source == SHARED or bits < 4:
        return 16
    return 4 if bits < _WHOLE_FROM else 1


def group_blocks(width: int, rows: int) -> int:
    """Blocks of 64 codes, of `rows` rows, that hold `width` columns: 2, 4 or a multiple of 8."""
    blocks = -(-width * rows // 64)
    small = {16: (4,), 4: (2, 4), 1: ()}[rows]
    return next((n for n in small if blocks <= n), -(-blocks // 8) * 8)


def as_integers(tables: Tensor, most: int) -> tuple[Tensor, float, int] | None:
    """(entries from 0 to `most`, step, zero) with tables == step * (entries - zero) exactly, or None."""
    for k in range(17):
        scaled = tables * 2.0**k
        if torch.equal(scaled, scaled.round()):
            low, high = min(0, int(scaled.min())), int(scaled.max())
            return (scaled - low, 2.0**-k, -low) if high - low <= most else None
    return None


def rounded(tables: Tensor, wide: bool, half_steps: bool, odd: bool = False) -> tuple[Tensor, Tensor, float]:
    """(entries, steps (..., 1), zero) with every table close to its step * (entries - zero).

    half_steps: the steps must be fp16 numbers, and are rounded up to them.  odd: entries c and ~c sum to a table's
    largest, as their levels do to 0.
    """
    reach = (32767 if wide else 127) + odd / 2
    step = tables.abs().amax(-1, keepdim=True) / reach
    if half_steps:
        up = (step * (1 + 2.0**-10) + 2.0**-25).to(torch.float16).to(torch.float32)
        step = torch.where(up.isfinite(), up, step)
    step = torch.where(step > 0, step, torch.ones_like(step))
    if odd:
        first = (tables[..., : tables.shape[-1] // 2] / step + reach).round().clamp(0, 2 * reach)
        return torch.cat([first, 2 * reach - first.flip(-1)], -1), step, reach
    return (tables / step).round().clamp(-reach, reach) + (reach + 1), step, reach + 1


def byte_tables(lookup: Lookup, shape: tuple[int, int], width: int, bits: int, kind: Entries) -> ByteTables:
    """The tables of a matrix of `shape` (rows, columns) in groups of `width` columns.

    kind: "bytes", or "words" to store tables that bytes cannot hold exactly in two bytes an entry, or "floats".
    """
    rows, columns = shape
    groups = -(-columns // width)
    wide, floats = kind != "bytes", kind == "floats"
    if floats and not torch.equal(lookup.zero.to(torch.float16).to(torch.float32), lookup.zero):
        lookup = _without_zero(lookup)
    fixed = as_integers(lookup.tables, 255) or (as_integers(lookup.tables, 65535) if wide else None)
    tables, count = lookup.tables, lookup.tables.shape[0]
    single, narrow = count == 1, fixed is not None and bool(fixed[0].max() <= 255)
    small = fixed is not None and bool(fixed[0].max() <= _BANK_MOST)
    banked = (small or floats) and not single and _fits_bank(lookup, bits)
    source = SHARED if single else BANK if banked else OWN
    summed = banked and not floats and bits == _SUMMED and are_sums(tables)
    R = 16 if summed else rows_per_tile(bits, source)
    F = group_blocks(width, R)
    tiles = -(-rows // R)
    padded = groups if F >= 8 else -(-groups * F // 8) * 8 // F

    def tiled(values: Tensor) -> Tensor:
        """(rows|1, groups|1, ...) to (tiles, padded groups, R, ...), padding zero."""
        full = values.expand(rows, groups, *values.shape[2:])
        out = full.new_zeros(tiles * R, padded, *values.shape[2:])
        out[:rows, :groups] = full
        return out.unflatten(0, (tiles, R)).transpose(1, 2).contiguous()

    def of_rows(tables: Tensor) -> Tensor:
        """Tables (rows|1, groups|1, entries) as records, of a row or of its groups: (n, R, entries)."""
        made.records_per_tile = padded if tables.shape[1] > 1 else 1
        return tiled(tables)[:, : made.records_per_tile].flatten(0, 1)  # rows' tables are the same in every group

    each = tables if single or lookup.table is None else tables[lookup.table]  # (rows|1, groups|1, entries)
    each = each if each.dim() == 3 else each[None]
    scale, zero = lookup.scale if banked else lookup.factor(), lookup.zero
    made = ByteTables(R, F, source, False, tables, 0, 0, 0.0, torch.ones(tiles * R))
    made.is_exact = floats or fixed is not None
    if floats:
        made.tables = _float_records(of_rows(each) if source == OWN else tables, banked)
    elif fixed is not None:
        entries, step, base = fixed
        scale, zero = scale * step, zero / step + base
        entries = entries if source != OWN or lookup.table is None else entries[lookup.table]
    else:
        half = bits in _HALVED and source == OWN
        made.mirrored = half and torch.equal(tables, -tables.flip(-1))
        entries, steps, offset = rounded(each, wide, groups > 1 and not single, made.mirrored)
        zero = zero / steps[..., 0] + offset
        scale = scale * steps[..., 0]
    if not floats:
        # own tables of many bits have two bytes an entry always: there is no other kernel
        made.wide = wide and (not narrow or (bits >= _WHOLE_FROM and source == OWN))
        if single:
            made.tables = _records(entries.reshape(1, -1), bits, 1, made.wide)
        elif banked:
            made.tables = _bank(_halves(entries) if summed else entries)
        else:
            entries = entries[..., : entries.shape[-1] // 2] if made.mirrored else entries
            made.tables = _records(of_rows(entries), bits, R, made.wide)
    if banked:
        made.bank_bits = max(0, (count - 1).bit_length())
        made.ids, made.powers = _ids(lookup, made.bank_bits, rows, groups, tiled)
    made.record_bytes = made.tables.shape[-1] * made.tables.element_size() if made.tables.dim() > 1 else 0
    _set_zero(made, zero, tiled)
    _set_scale(made, scale, groups, tiled, wide, rows)
    return made


def _without_zero(lookup: Lookup) -> Lookup:
    """The same levels with tables of their own for all that has another zero."""
    levels = lookup.levels()
    which = torch.arange(levels.shape[0] * levels.shape[1]).view(levels.shape[:2])
    return Lookup(levels.flatten(0, 1), torch.ones(1, 1), torch.zeros(1, 1), which)


def _float_records(tables: Tensor, banked: bool) -> Tensor:
    """Tables (n, ...) as records of at least 64 numbers; a bank is one, of a power of two of tables."""
    if banked:
        more = (1 << (tables.shape[0] - 1).bit_length()) - tables.shape[0]
        return torch.nn.functional.pad(tables, (0, 0, 0, more)).flatten().contiguous()
    flat = tables.flatten(1)
    return torch.nn.functional.pad(flat, (0, max(0, 64 - flat.shape[1]))).contiguous()


def _fits_bank(lookup: Lookup, bits: int) -> bool:
    count = lookup.tables.shape[0]
    powers = 1 if lookup.powers is None else len(lookup.powers)
    space = 256 >> max(0, (count - 1).bit_length())
    per_row = lookup.scale.shape[1] == 1  # what a bank's powers do not say, the row must
    return bits < _WHOLE_FROM and count <= _BANK_TABLES and powers <= min(space, _BANK_POWERS) and per_row


def _ids(lookup: Lookup, bank_bits: int, rows: int, groups: int, tiled: Tiled) -> tuple[Tensor, Tensor]:
    powers = torch.ones(_BANK_POWERS)
    ids = torch.zeros(1, 1, dtype=torch.int64) if lookup.table is None else lookup.table
    if lookup.powers is not None and lookup.power is not None:
        powers[: len(lookup.powers)] = lookup.powers
        ids = ids + (lookup.power << bank_bits)
    return tiled(ids.to(torch.uint8)), powers


def _bytes(entries: Tensor, wide: bool) -> list[Tensor]:
    whole = entries.to(torch.int32)
    return [(part & 255).to(torch.uint8) for part in ((whole, whole >> 8) if wide else (whole,))]


def _records(entries: Tensor, bits: int, R: int, wide: bool) -> Tensor:
    """One record a line: (n, 2**bits) of one table each, or (n, R, 2**bits) of R rows' tables."""
    made = []
    for part in _bytes(entries, wide):
        if part.dim() == 3 and R == 16:  # four entries of each row, then the next four
            part = torch.nn.functional.pad(part, (0, -part.shape[-1] % 4))
            part = part.unflatten(-1, (-1, 4)).transpose(1, 2).flatten(1)
        else:
            part = part.flatten(1)
            if R == 1 and part.shape[1] < 64:  # repeated: the kernels leave dirt above the code
                part = part.repeat(1, 64 // part.shape[1])
        made.append(part)
    return torch.cat(made, 1).contiguous()


def _bank(entries: Tensor) -> Tensor:
    """Tables of 16 bytes each, or words of four entries, of 32 tables."""
    part = _bytes(entries, False)[0]
    full = torch.zeros(_BANK_TABLES, max(4, part.shape[1]), dtype=torch.uint8)
    full[: part.shape[0], : part.shape[1]] = part
    whole = part.shape[1] == 16
    return full.flatten() if whole else full.unflatten(1, (-1, 4)).transpose(0, 1).contiguous().flatten()


def are_sums(tables: Tensor) -> bool:
    """Whether in each table (n, 16) two bits of a code add their part to that of the other two, as in codings."""
    first, second = tables[:, :4], tables[:, ::4] - tables[:, :1]
    return torch.equal(tables, (second[:, :, None] + first[:, None]).flatten(1))


def _halves(entries: Tensor) -> Tensor:
    """The parts of bytes (n, 16) that are sums: bytes (n, 8), of the lower two bits and of the upper two."""
    first, second = entries[:, :4], entries[:, ::4] - entries[:, :1]
    least = second.amin(1, keepdim=True)
    return torch.cat([first + least, second - least], 1)


def _set_zero(made: ByteTables, zero: Tensor, tiled: Tiled) -> None:
    if bool((zero == zero.flatten()[0]).all()):
        made.zero = float(zero.flatten()[0])
        return
    whole = torch.equal(zero, zero.round()) and float(zero.min()) >= 0 and float(zero.max()) <= 255
    made.zeros = tiled(zero.to(torch.uint8 if whole else torch.float16))


def _set_scale(made: ByteTables, scale: Tensor, groups: int, tiled: Tiled, wide: bool, rows: int) -> None:
    """Scales of groups in fp16 where that is exact, or else, unless `wide`, within 2^-11 beside one of the row."""
    if scale.shape[1] == 1 or groups == 1:
        made.row_scales[:rows] = scale[:, 0].expand(rows)
        return
    half = scale.to(torch.float16)
    if torch.equal(half.to(torch.float32), scale):
        made.scales = tiled(half)
    elif wide:
        made.scales = tiled(scale)
    else:
        top = scale.abs().amax(1, keepdim=True).clamp(min=1e-30) / 1024
        made.row_scales[:rows] = top[:, 0].expand(rows)
        made.scales = tiled((scale / top).to(torch.float16))
