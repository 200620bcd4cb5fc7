"""Tables of a scalar format for the lookup kernels: unsigned bytes, 16-bit numbers in two bytes, or fp32.

    W^ = row_scale * scale * (table[code] - zero)

Tables are exact if all entries are multiples of one power of two within the range (codes, codings, e2m1, e2m3).
Other tables are rounded, each with a step of its own: an entry then changes by at most 1/254 of the table's
largest magnitude in one byte, 1/65534 in two. Of tables of rows or groups that equal their own negative read
backwards (binary coding without an offset) only one half is stored.

Numbers of a row's groups are stored tile by tile, as (tiles, groups, rows of a tile): csrc/lut/layout.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bitmill.formats import Lookup

Entries = Literal["bytes", "words", "floats"]
Integers = tuple[Tensor, float, int]  # entries, step, zero: see `as_integers`

SHARED, OWN, BANK = 0, 1, 2  # csrc/lut/lookup.h: Source
_BANK_TABLES, _BANK_POWERS, _BANK_MAX_ENTRY = 32, 16, 63
_HALVED = (3, 4)  # bits of tables that can be stored by half
_SUMMED = 4  # bits of tables that can be looked up as sums
_CLOSE = 1.0625  # of steps in fp16 to what tables need
_WHOLE_FROM = 5  # bits from which a table fills a vector, and a tile is one row


@dataclass
class LookupTables:
    """Everything that the kernels read besides the codes.

    Attributes:
        rows_per_tile: Rows of a tile.
        group_blocks: Blocks of 64 codes of a group.
        source: SHARED, OWN or BANK: one table, tables of rows or groups, or a bank of tables.
        wide: Entries have two bytes.
        tables: uint8, or fp32 for entries "floats".
        record_bytes: Bytes of a record of tables.
        records_per_tile: 0 if all rows share one, 1 for a row's, or the number of padded groups.
        zero: The zero where it is constant.
        row_scales: fp32 (tiles * rows of a tile,).
        scales: fp16 or fp32, of groups.
        zeros: uint8 or fp16, of groups.
        ids: uint8, table and power of a group in a bank.
        powers: fp32 (16,), factors of groups in a bank.
        bank_bits: Bits of a table's number in `ids`.
        mirrored: Tables hold their first half only.
        is_exact: Tables hold the format's levels without rounding.
    """

    rows_per_tile: int
    group_blocks: int
    source: int
    wide: bool
    tables: Tensor
    record_bytes: int
    records_per_tile: int
    zero: float
    row_scales: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    ids: Tensor | None = None
    powers: Tensor | None = None
    bank_bits: int = 0
    mirrored: bool = False
    is_exact: bool = False


@dataclass(frozen=True)
class _Tiling:
    """The order of rows and groups in memory: tiles of `rows_per_tile` rows, groups padded to whole chunks."""

    rows: int
    groups: int
    rows_per_tile: int
    group_blocks: int

    @property
    def tiles(self) -> int:
        return -(-self.rows // self.rows_per_tile)

    @property
    def padded_groups(self) -> int:
        blocks = self.group_blocks
        return self.groups if blocks >= 8 else -(-self.groups * blocks // 8) * 8 // blocks

    def __call__(self, values: Tensor) -> Tensor:
        """Return values (rows|1, groups|1, ...) as (tiles, padded groups, rows of a tile, ...), padded by zero."""
        full = values.expand(self.rows, self.groups, *values.shape[2:])
        out = full.new_zeros(self.tiles * self.rows_per_tile, self.padded_groups, *values.shape[2:])
        out[: self.rows, : self.groups] = full
        return out.unflatten(0, (self.tiles, self.rows_per_tile)).transpose(1, 2).contiguous()


def rows_per_tile(bits: int, source: int) -> int:
    """Return the rows of a tile.

    Args:
        bits: Bits of a code.
        source: SHARED, OWN or BANK.

    Returns:
        16 if a vector holds 16 rows' tables or all rows share one table, else 4 or 1.
    """
    if source == SHARED or bits < 4:
        return 16
    return 4 if bits < _WHOLE_FROM else 1


def group_blocks(width: int, rows: int) -> int:
    """Return the blocks of 64 codes of a group.

    Args:
        width: Columns of the group.
        rows: Rows of a tile.

    Returns:
        2, 4 or a multiple of 8.
    """
    blocks = -(-width * rows // 64)
    small = {16: (4,), 4: (2, 4), 1: ()}[rows]
    return next((n for n in small if blocks <= n), -(-blocks // 8) * 8)


def as_integers(tables: Tensor, largest: int) -> Integers | None:
    """Return (entries, step, zero) with tables == step * (entries - zero) exactly, or None.

    Tables of nothing but zeros have no step of their own; `rounded` gives them step 0.

    Args:
        tables: fp32 tables of any shape.
        largest: The largest entry allowed; the smallest is 0.
    """
    if not tables.any():
        return None
    for k in range(17):
        scaled = tables * 2.0**k
        if torch.equal(scaled, scaled.round()):
            low, high = min(0, int(scaled.min())), int(scaled.max())
            return (scaled - low, 2.0**-k, -low) if high - low <= largest else None
    return None


def rounded(tables: Tensor, wide: bool, half_steps: bool, odd: bool = False) -> tuple[Tensor, Tensor, float]:
    """Round tables to integers with a step each.

    Args:
        tables: fp32 (..., entries).
        wide: Use 16-bit entries instead of 8-bit ones.
        half_steps: Round the steps up to numbers with fp16's precision, and within its range where that is close.
        odd: Make entries c and ~c sum to the largest entry of a table, as their levels sum to 0.

    Returns:
        Entries, steps (..., 1), and the zero, with every table close to its step * (entries - zero). Tables of
        zeros have step 0: odd entries are never equal to the zero.
    """
    reach = (32767 if wide else 127) + odd / 2
    step = tables.abs().amax(-1, keepdim=True) / reach
    if half_steps:
        step = _half_steps(step)
    unit = torch.where(step > 0, step, torch.ones_like(step))
    if odd:
        first = (tables[..., : tables.shape[-1] // 2] / unit + reach).round().clamp(0, 2 * reach)
        return torch.cat([first, 2 * reach - first.flip(-1)], -1), step, reach
    return (tables / unit).round().clamp(-reach, reach) + (reach + 1), step, reach + 1


def _half_steps(step: Tensor) -> Tensor:
    """Round steps up to fp16, or to 11 bits where fp16 has no number that is close."""
    up = (step * (1 + 2.0**-10) + 2.0**-25).to(torch.float16).to(torch.float32)
    mantissa, exponent = torch.frexp(step)
    close = torch.ldexp((mantissa * 2**11).ceil() / 2**11, exponent)
    return torch.where((step > 0) & (up <= _CLOSE * step), up, close)


def lookup_tables(lookup: Lookup, shape: tuple[int, int], width: int, bits: int, kind: Entries) -> LookupTables:
    """Build the tables of a matrix.

    Args:
        lookup: Tables, scales and zeros of the format.
        shape: (rows, columns).
        width: Columns of a group.
        bits: Bits of a code.
        kind: "bytes"; "words" to store tables that bytes cannot hold exactly in two bytes per entry; "floats".
    """
    rows, columns = shape
    groups = -(-columns // width)
    wide, floats = kind != "bytes", kind == "floats"
    in_half = torch.equal(lookup.zero.to(torch.float16).to(torch.float32), lookup.zero)  # as zeros are stored
    is_exact = in_half and lookup.offset is None
    if not is_exact and (floats or (wide and not _is_constant(lookup.zero))):
        lookup = without_zero(lookup)
    integers = as_integers(lookup.tables, 255) or (as_integers(lookup.tables, 65535) if wide else None)
    if wide and integers is None and not _is_constant(lookup.zero):
        lookup = without_zero(lookup)  # in units of 16-bit entries fp16 is too coarse for it
    source = _source_of(lookup, bits, integers, floats)
    summed = source == BANK and not floats and bits == _SUMMED and are_sums(lookup.tables)
    tile_rows = 16 if summed else rows_per_tile(bits, source)
    tiling = _Tiling(rows, groups, tile_rows, group_blocks(width, tile_rows))
    row_scales = torch.ones(tiling.tiles * tile_rows)
    made = LookupTables(tile_rows, tiling.group_blocks, source, False, lookup.tables, 0, 0, 0.0, row_scales)
    made.is_exact = floats or integers is not None
    if floats:
        scale, zero = lookup.scale if source == BANK else lookup.factor(), lookup.zero
        tables = _of_rows(made, _each(lookup), tiling) if source == OWN else lookup.tables
        made.tables = _float_records(tables, source == BANK)
    else:
        is_narrow = integers is not None and bool(integers[0].max() <= 255)
        # own tables of many bits always have two bytes per entry: there is no other kernel
        made.wide = wide and (not is_narrow or (bits >= _WHOLE_FROM and source == OWN))
        entries, scale, zero = _entries(made, lookup, bits, integers, wide, groups)
        made.tables = _stored_entries(made, entries, bits, summed, tiling)
    if source == BANK:
        made.bank_bits = max(0, (len(lookup.tables) - 1).bit_length())
        made.ids, made.powers = _ids(lookup, made.bank_bits, tiling)
    made.record_bytes = made.tables.shape[-1] * made.tables.element_size() if made.tables.dim() > 1 else 0
    _set_zero(made, zero, tiling)
    _set_scale(made, scale, tiling, wide)
    return made


def _source_of(lookup: Lookup, bits: int, integers: Integers | None, floats: bool) -> int:
    if len(lookup.tables) == 1:
        return SHARED
    is_small = integers is not None and bool(integers[0].max() <= _BANK_MAX_ENTRY)
    return BANK if (is_small or floats) and _fits_bank(lookup, bits) else OWN


def _each(lookup: Lookup) -> Tensor:
    """Return the table of every row and group, (rows|1, groups|1, entries)."""
    tables = lookup.tables if len(lookup.tables) == 1 or lookup.table is None else lookup.tables[lookup.table]
    return tables if tables.dim() == 3 else tables[None]


def _entries(
    made: LookupTables, lookup: Lookup, bits: int, integers: Integers | None, wide: bool, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return integer entries with their scale and zero: exact ones if there are `integers`, or else rounded."""
    scale = lookup.scale if made.source == BANK else lookup.factor()
    if integers is not None:
        entries, step, base = integers
        if made.source == OWN and lookup.table is not None:
            entries = entries[lookup.table]
        return entries, scale * step, lookup.zero / step + base
    made.mirrored = bits in _HALVED and made.source == OWN and torch.equal(lookup.tables, -lookup.tables.flip(-1))
    entries, steps, offset = rounded(_each(lookup), wide, groups > 1 and made.source != SHARED, made.mirrored)
    unit = steps[..., 0]
    zero = torch.where(unit > 0, lookup.zero / unit.clamp(min=torch.finfo(unit.dtype).tiny), lookup.zero)
    return entries, scale * unit, zero + offset


def _stored_entries(made: LookupTables, entries: Tensor, bits: int, summed: bool, tiling: _Tiling) -> Tensor:
    """Return integer entries as the bytes that the kernels read."""
    if made.source == SHARED:
        return _records(entries.reshape(1, -1), bits, 1, made.wide)
    if made.source == BANK:
        return _bank(_halves(entries) if summed else entries)
    if made.mirrored:
        entries = entries[..., : entries.shape[-1] // 2]
    return _records(_of_rows(made, entries, tiling), bits, made.rows_per_tile, made.wide)


def _of_rows(made: LookupTables, tables: Tensor, tiling: _Tiling) -> Tensor:
    """Return tables (rows|1, groups|1, entries) as records of a row or of its groups: (n, rows of a tile,
    entries).
    """
    made.records_per_tile = tiling.padded_groups if tables.shape[1] > 1 else 1
    return tiling(tables)[:, : made.records_per_tile].flatten(0, 1)  # a row's table is alike in all groups


def without_zero(lookup: Lookup) -> Lookup:
    """Return the levels as tables with zero 0, one for each row and group."""
    levels = lookup.levels()
    which = torch.arange(levels.shape[0] * levels.shape[1]).view(levels.shape[:2])
    return Lookup(levels.flatten(0, 1), torch.ones(1, 1), torch.zeros(1, 1), which)


def _float_records(tables: Tensor, banked: bool) -> Tensor:
    """Return tables (n, ...) as records of at least 64 numbers; a bank is one record of 2**k tables."""
    if banked:
        more = (1 << (tables.shape[0] - 1).bit_length()) - tables.shape[0]
        return torch.nn.functional.pad(tables, (0, 0, 0, more)).flatten().contiguous()
    flat = tables.flatten(1)
    return torch.nn.functional.pad(flat, (0, max(0, 64 - flat.shape[1]))).contiguous()


def _fits_bank(lookup: Lookup, bits: int) -> bool:
    count = lookup.tables.shape[0]
    powers = 1 if lookup.powers is None else len(lookup.powers)
    space = 256 >> max(0, (count - 1).bit_length())
    per_row = lookup.scale.shape[1] == 1  # groups differ by the bank's powers only
    return bits < _WHOLE_FROM and count <= _BANK_TABLES and powers <= min(space, _BANK_POWERS) and per_row


def _ids(lookup: Lookup, bank_bits: int, tiling: _Tiling) -> tuple[Tensor, Tensor]:
    """Return the table and power of every group, and the powers."""
    powers = torch.ones(_BANK_POWERS)
    ids = torch.zeros(1, 1, dtype=torch.int64) if lookup.table is None else lookup.table
    if lookup.powers is not None and lookup.power is not None:
        powers[: len(lookup.powers)] = lookup.powers
        ids = ids + (lookup.power << bank_bits)
    return tiling(ids.to(torch.uint8)), powers


def _bytes(entries: Tensor, wide: bool) -> list[Tensor]:
    whole = entries.to(torch.int32)
    return [(part & 255).to(torch.uint8) for part in ((whole, whole >> 8) if wide else (whole,))]


def _records(entries: Tensor, bits: int, R: int, wide: bool) -> Tensor:
    """Return records of bytes, one per line.

    Args:
        entries: (n, 2**bits), a table each, or (n, R, 2**bits), R rows' tables each.
        bits: Bits of a code.
        R: Rows of a tile.
        wide: Store the low bytes, then the high bytes.
    """
    made = []
    for part in _bytes(entries, wide):
        if part.dim() == 3 and R == 16:  # four entries of each row, then the next four
            part = torch.nn.functional.pad(part, (0, -part.shape[-1] % 4))
            part = part.unflatten(-1, (-1, 4)).transpose(1, 2).flatten(1)
        else:
            part = part.flatten(1)
            if R == 1 and part.shape[1] < 64:  # repeated: the kernels do not clear the bits above a code
                part = part.repeat(1, 64 // part.shape[1])
        made.append(part)
    return torch.cat(made, 1).contiguous()


def _bank(entries: Tensor) -> Tensor:
    """Return a bank of 32 tables: tables of 16 bytes each, or words of four entries."""
    part = _bytes(entries, False)[0]
    full = torch.zeros(_BANK_TABLES, max(4, part.shape[1]), dtype=torch.uint8)
    full[: part.shape[0], : part.shape[1]] = part
    whole = part.shape[1] == 16
    return full.flatten() if whole else full.unflatten(1, (-1, 4)).transpose(0, 1).contiguous().flatten()


def are_sums(tables: Tensor) -> bool:
    """Return True if every table (n, 16) is a sum of a part for the lower and one for the upper two bits of a
    code.
    """
    first, second = tables[:, :4], tables[:, ::4] - tables[:, :1]
    return torch.equal(tables, (second[:, :, None] + first[:, None]).flatten(1))


def _halves(entries: Tensor) -> Tensor:
    """Return both parts of tables (n, 16) that are sums: (n, 8), of the lower and of the upper bits."""
    first, second = entries[:, :4], entries[:, ::4] - entries[:, :1]
    least = second.amin(1, keepdim=True)
    return torch.cat([first + least, second - least], 1)


def _is_constant(zero: Tensor) -> bool:
    return bool((zero == zero.flatten()[0]).all())


def _set_zero(made: LookupTables, zero: Tensor, tiling: _Tiling) -> None:
    """Store the zero (rows|1, groups|1) as a constant, bytes or fp16."""
    if _is_constant(zero):
        made.zero = float(zero.flatten()[0])
        return
    whole = torch.equal(zero, zero.round()) and float(zero.min()) >= 0 and float(zero.max()) <= 255
    made.zeros = tiling(zero.to(torch.uint8 if whole else torch.float16))


def _set_scale(made: LookupTables, scale: Tensor, tiling: _Tiling, wide: bool) -> None:
    """Store the scale (rows|1, groups|1) of rows, or of groups.

    Groups' scales are fp16 where that is exact; otherwise fp32 if `wide`, or fp16 relative to a power of two of
    the row, with relative error 2^-11.
    """
    rows = tiling.rows
    if scale.shape[1] == 1 or tiling.groups == 1:
        made.row_scales[:rows] = scale[:, 0].expand(rows)
        return
    half = scale.to(torch.float16)
    if torch.equal(half.to(torch.float32), scale):
        made.scales = tiling(half)
    elif wide:
        made.scales = tiling(scale)
    else:
        _, exponent = torch.frexp(scale.abs().amax(1, keepdim=True))
        top = torch.ldexp(torch.ones_like(scale[:, :1]), (exponent - 11).clamp(min=-126))  # quotients below 2048
        made.row_scales[:rows] = top[:, 0].expand(rows)
        made.scales = tiling((scale / top).to(torch.float16))
