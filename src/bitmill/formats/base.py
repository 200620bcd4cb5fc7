"""The contract of a format: named tensors of known shapes that decode to a matrix.

    codes    (rows, stored codes a row)   unsigned integers
    params   name -> fp32 working values, already rounded as stored

`Format` is what storage and the runtime use. `GroupFormat` adds the operations that solvers use, on grouped
tensors, so that solvers never deal with ragged edges or files:

    x           (rows, groups, width)            the numbers to store
    importance  (rows|1, groups, width)          weight of each squared error, 0 on padding
    params      name -> (rows|1, groups|1, ...)  fp32 working values; size 1 means shared
    codes       (rows, groups, width / block * codes_per_block)   unsigned integers below 2**code_bits

A scalar format codes one column at a time from a small table. A vector format codes `block` columns jointly, in
`codes_per_block` integers. Laws, tested for every registered format (tests/conformance/test_formats.py):

    unpack(pack(codes, params)) == (codes, params)
    packed bytes * 8 == stored_bits(shape)
    decode(nearest(decode(codes))) == decode(codes)            quantizing twice changes nothing
    nearest is the best code of brute force
    fake_quantize(W, params) == dequantize(nearest_codes(W, params))            with gradients
    refit never raises the weighted error
    repr and dict round-trip
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from bitmill.config.registry import Member, Registry
from bitmill.errors import RecipeError
from bitmill.formats.part import Part, not_finite
from bitmill.numerics.grouping import GroupSize, group_grid, group_width, grouped, ungrouped
from bitmill.numerics.packing import pack, unpack, words_for
from bitmill.numerics.straight_through import straight_through

Params = dict[str, Tensor]
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]  # name -> (shape, dtype) of tensors on disk
Rounder = Callable[..., tuple[Tensor, Tensor]]

_LONG_ROW = 1 << 12  # columns of a row whose ragged end is negligible

FORMATS: Registry[type[Format]] = Registry("format", "bitmill.formats")


@dataclass(frozen=True)
class Format(Member, ABC):
    """Base of all formats: a frozen dataclass whose fields are exactly what a reader needs to decode."""

    registry: ClassVar[Registry[type[Format]]] = FORMATS

    @property
    def stackable(self) -> bool:
        """True where layers that read one input may be solved as one tall matrix."""
        return True

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that solving uses in addition to the solver's own, see `solvers.base`."""
        return frozenset()

    @property
    def shared(self) -> frozenset[str]:
        """Names of the parts that all layers of a kind share: learned before the first block, stored once."""
        return frozenset()

    @property
    def quantizes_inputs(self) -> bool:
        """True where the matrix multiplies rounded inputs, see `effective_inputs`."""
        return False

    @property
    def fits_inputs(self) -> bool:
        """True where rounded inputs follow from the inputs alone, so that `effective_inputs` needs no params."""
        return False

    @property
    def of_matrix(self) -> Format:
        """The format of the matrix alone, without that of its inputs."""
        return self

    def effective_inputs(self, x: Tensor, params: Params) -> Tensor:
        """Return the inputs (..., columns) that the decoded matrix multiplies in place of x (..., columns).

        Args:
            x: inputs of the layer.
            params: fp32 working values of the matrix by name.
        """
        return x

    def uncompiled_reason(self, columns: int) -> str | None:
        """Return why torch rounds a few tokens (tokens, columns), as a phrase; None where compiled code does."""
        return None

    @property
    @abstractmethod
    def core(self) -> GroupFormat:
        """The format that a solver works with: this one, or the one inside all wrappers."""

    @property
    @abstractmethod
    def code_bits(self) -> int:
        """Bits of one stored code, 1 to 16."""

    @property
    def rate(self) -> float:
        """Bits of the codes for one weight of a long row, the nominal bits of a format."""
        return self.codes_in(_LONG_ROW) * self.code_bits / _LONG_ROW

    @abstractmethod
    def codes_in(self, columns: int) -> int:
        """Return the number of codes that store a row of `columns` weights."""

    @abstractmethod
    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Return the stored parameter arrays of a matrix of `shape` (rows, columns), codes not included."""

    @abstractmethod
    def dequantize(self, codes: Tensor, params: Params, shape: tuple[int, int]) -> Tensor:
        """Decode a matrix.

        Args:
            codes: (rows, codes_in(columns)).
            params: fp32 working values by name.
            shape: (rows, columns).

        Returns:
            The stored matrix, fp32 of `shape`.
        """

    def of_network(self, matrices: Callable[[], Iterable[Tensor]]) -> Format:
        """Return the format with the fields that follow from all its matrices; by default there are none such.

        Args:
            matrices: reads the float matrices (rows, columns), one after another.
        """
        return self

    def for_columns(self, columns: int) -> Format:
        """Return the format of a matrix of so many columns: this one, unless its blocks must fill the rows."""
        return self

    @property
    def learned_integers(self) -> frozenset[str]:
        """Names of the parts stored as integers that a gradient moves, as it moves those stored as floats."""
        return frozenset()

    @abstractmethod
    def nearest_codes(self, W: Tensor, params: Params) -> Tensor:
        """Return the codes (rows, codes_in(columns)) of the storable matrix closest to W under fixed params.

        Args:
            W: fp32 (rows, columns).
            params: fp32 working values by name, those that a wrapper adds included.
        """

    @abstractmethod
    def fake_quantize(self, W: Tensor, params: Params) -> Tensor:
        """Return `dequantize(nearest_codes(W, params), params)` with gradients of W and of numbers in params.

        Gradients pass the rounding straight through, see `numerics.straight_through`.

        Args:
            W: fp32 (rows, columns).
            params: fp32 working values by name, as stored.
        """

    def damage_reason(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> str | None:
        """Return what no encoder stores in packed tensors, as part of a sentence; None where they are sound.

        Codes and tables are read once at most. A format overrides it if not all of its codes have a meaning.

        Args:
            tensors: as named by `layout`.
            shape: (rows, columns).
        """
        return not_finite(tensors)

    # -- tensors on disk ----------------------------------------------------------------------------------

    def layout(self, shape: tuple[int, int]) -> Layout:
        """Return name, shape and dtype of every tensor that decoding needs."""
        tensors = {p.name: (p.packed_shape, p.dtype) for p in self.parts(shape)}
        return {"codes": ((shape[0], words_for(self.codes_in(shape[1]), self.code_bits)), torch.int32), **tensors}

    def own_layout(self, shape: tuple[int, int]) -> Layout:
        """Return the layout of the tensors that a layer does not share."""
        return {name: entry for name, entry in self.layout(shape).items() if name not in self.shared}

    def shared_layout(self) -> Layout:
        """Return the layout of the tensors that layers share, whose sizes depend on no matrix."""
        return {name: entry for name, entry in self.layout((1, 1)).items() if name in self.shared}

    def stored_bits(self, shape: tuple[int, int]) -> int:
        """Return the bits on disk of a single matrix of `shape`, everything included."""
        return _bits(self.layout(shape))

    def own_bits(self, shape: tuple[int, int]) -> int:
        """Return the bits on disk of a layer without the parts that it shares."""
        return _bits(self.own_layout(shape))

    def pack(self, codes: Tensor, params: Params, shape: tuple[int, int]) -> dict[str, Tensor]:
        """Return codes and params as the tensors that `layout` names.

        Args:
            codes: (rows, codes_in(columns)).
            params: fp32 working values by name.
            shape: (rows, columns).
        """
        return {
            "codes": pack(codes, self.code_bits),
            **{part.name: part.pack(params[part.name]) for part in self.parts(shape)},
        }

    def unpack(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Params]:
        """Invert `pack`: return codes, and fp32 params.

        Args:
            tensors: as named by `layout`.
            shape: (rows, columns).
        """
        return self.unpack_codes(tensors["codes"], shape[1]), self.unpack_params(tensors, shape)

    def unpack_codes(self, stored: Tensor, columns: int) -> Tensor:
        """Unpack the codes (rows, codes_in(columns)) of some rows, uint8 up to 8 bits, int32 above.

        Args:
            stored: int32 (rows, words).
            columns: weights in a row.
        """
        return unpack(stored, self.code_bits, self.codes_in(columns))

    def unpack_params(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> Params:
        """Return the params without the codes, fp32."""
        return {part.name: part.unpack(tensors[part.name]) for part in self.parts(shape)}

    def pack_shared(self, params: Params) -> dict[str, Tensor]:
        """Return the shared parts as the tensors that `shared_layout` names."""
        return {part.name: part.pack(params[part.name]) for part in self.parts((1, 1)) if part.name in self.shared}

    def unpack_shared(self, tensors: dict[str, Tensor]) -> Params:
        """Invert `pack_shared`."""
        parts = (part for part in self.parts((1, 1)) if part.name in self.shared)
        return {part.name: part.unpack(tensors[part.name]) for part in parts}


def _bits(layout: Layout) -> int:
    return sum(torch.Size(size).numel() * dtype.itemsize * 8 for size, dtype in layout.values())


@dataclass(frozen=True)
class GroupFormat(Format):
    """Base of the formats that solvers work with: numbers in groups of input columns that share parameters."""

    bits: int
    group_size: GroupSize = 64

    block: ClassVar[int] = 1  # columns coded jointly
    feeds_inside: ClassVar[bool] = False  # rounders of blocks take U of `solvers.feedback` as well
    max_bits: ClassVar[int] = 8
    groups_independent: ClassVar[bool] = True  # one group can be fitted without the rest of its row
    shareable: ClassVar[frozenset[str]] = frozenset()  # parts of one size for all matrices, which layers may share
    learned_codebooks: ClassVar[bool] = False  # a block is `scale` times a sum of vectors from `codebooks`
    standard_group: ClassVar[int | None] = None  # columns of a group where a standard fixes them

    @classmethod
    def default_bits(cls, given: Mapping[str, Any]) -> int:
        """Return the bits of inputs whose other options are `given`: 8, or the most that the format has."""
        return min(8, cls.max_bits)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.bits <= self.max_bits:
            raise RecipeError(
                f"{self.name} stores 1 to {self.max_bits} bits, not {self.bits!r}; choose bits in that range."
            )
        size = self.group_size
        if isinstance(size, int) and (size < 1 or size % self.block):
            multiple = f" that is a multiple of {self.block}" if self.block > 1 else ""
            raise RecipeError(
                f"group_size is {size!r}; use a positive number of input columns{multiple}, 'row' or 'tensor'."
            )

    @property
    def core(self) -> GroupFormat:
        """This format."""
        return self

    @property
    def stackable(self) -> bool:
        """True unless the whole tensor is one group: rows do not depend on each other."""
        return self.group_size != "tensor"

    @property
    def arithmetic(self) -> Literal["integer", "float"] | None:
        """How processors multiply numbers of the format without decoding them; None where they do not."""
        return None

    def integers(self, codes: Tensor, params: Params) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the numbers as integers of 8 bits, where `arithmetic` is "integer": scale * (integers - zero).

        Args:
            codes: unsigned integers, any shape.
            params: fp32 working values by name.

        Returns:
            int8 of the shape of codes; scale (rows|1, groups|1); zero of that shape, None where it is 0.
        """
        raise NotImplementedError

    @property
    def input_arithmetic(self) -> Literal["integer", "float"] | None:
        """How processors multiply inputs of the format: its `arithmetic`, or integers of several bytes."""
        return self.arithmetic

    def integer_digits(self, codes: Tensor, params: Params) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return inputs as integers of one or more bytes, where `input_arithmetic` is "integer".

        The numbers are scale * (sum over k of digits[k] * 256^k - zero).

        Args:
            codes: unsigned integers (rows, columns).
            params: fp32 working values by name.

        Returns:
            int8 (digits, rows, columns); scale (rows|1, groups|1); zero of that shape, None where it is 0.
        """
        integers, scale, zero = self.integers(codes, params)
        return integers[None], scale, zero

    # -- meaning ------------------------------------------------------------------------------------------
    @abstractmethod
    def fit(self, x: Tensor, importance: Tensor, search: bool = True) -> Params:
        """Fit parameters to x.

        Args:
            x: (rows, groups, width).
            importance: (rows|1, groups, width).
            search: return the best parameters found by search instead of the closed-form start.
        """

    @abstractmethod
    def nearest(self, x: Tensor, params: Params) -> Tensor:
        """Return the codes of the storable numbers closest to x.

        Args:
            x: (rows, groups, width).
            params: of its groups.

        Returns:
            uint8 up to 8 bits, int32 above, (rows, groups, width / block * codes_per_block).
        """

    @abstractmethod
    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Return the stored numbers.

        Args:
            codes: (rows, groups, width / block * codes_per_block).
            params: of their groups.

        Returns:
            fp32 (rows, groups, width).
        """

    def nearest_codes(self, W: Tensor, params: Params) -> Tensor:
        """Return the codes of `nearest`."""
        codes = self.nearest(grouped(W, self.group_size, self.block), params)
        return codes.reshape(W.shape[0], -1)[:, : self.codes_in(W.shape[1])].contiguous()

    def fake_quantize(self, W: Tensor, params: Params) -> Tensor:
        """Return the nearest storable matrix, with gradients."""
        x = grouped(W, self.group_size, self.block)
        codes = self.nearest(x.detach(), {name: value.detach() for name, value in params.items()})
        y = straight_through(self.decode(codes, params), x, self.unrounded(x, params))
        return ungrouped(y, (W.shape[0], W.shape[1]))

    def unrounded(self, x: Tensor, params: Params) -> Tensor:
        """Return x as a function of params, here of none, see `numerics.straight_through`.

        Args:
            x: (rows, groups, width).
            params: of its groups, with gradients.
        """
        return x.detach()

    @abstractmethod
    def rounder(self, params: Params) -> Rounder:
        """Return a function that quickly rounds one column, or block of columns, of a single group.

        Scalar formats: w (rows,) -> codes (rows,), values (rows,).
        Vector formats: w (rows, block) -> codes (rows, codes_per_block), values (rows, block).

        Args:
            params: of that group, (rows|1, 1, ...).
        """

    def fit_group(self, x: Tensor, importance: Tensor, params: Params) -> Params:
        """Fit parameters to groups without the rest of their rows.

        Args:
            x: (rows, groups, width).
            importance: (rows|1, groups, width).
            params: the parts that groups share stay as they are here.
        """
        return self.fit(x, importance)

    def refit(self, x: Tensor, codes: Tensor, importance: Tensor, params: Params) -> Params:
        """Return parameters of least weighted error for fixed codes; `params` where the format has no better.

        Args:
            x: (rows, groups, width).
            codes: of x.
            importance: (rows|1, groups, width).
            params: the present parameters.
        """
        return params

    @property
    def can_shift(self) -> bool:
        """True where the levels of a group can be moved together, see `shift`."""
        return False

    def shift(self, params: Params, by: Tensor) -> Params:
        """Return parameters whose levels are higher, as nearly as can be stored; see `can_shift`.

        Args:
            params: the present parameters.
            by: (rows, groups).
        """
        raise NotImplementedError

    # -- storage ------------------------------------------------------------------------------------------

    @property
    def code_bits(self) -> int:
        """Bits of one code; a column has one, of `bits` bits, unless a vector format overrides it."""
        return self.bits

    @property
    def codes_per_block(self) -> int:
        """Codes that store one block of columns."""
        return 1

    def codes_in(self, columns: int) -> int:
        """Return the codes of a row: `codes_per_block` for every whole or ragged block."""
        return -(-columns // self.block) * self.codes_per_block

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return (rows, groups) of the parameters of a matrix of `shape`."""
        return group_grid(shape, self.group_size, self.block)

    def width(self, shape: tuple[int, int]) -> int:
        """Return the columns of one group of a matrix of `shape`."""
        return group_width(shape, self.group_size, self.block)

    def dequantize(self, codes: Tensor, params: Params, shape: tuple[int, int]) -> Tensor:
        """Return the stored matrix, fp32 of `shape`."""
        size = self.group_size
        if isinstance(size, int):
            size = min(size, self.width(shape)) // self.block * self.codes_per_block
        return ungrouped(self.decode(grouped(codes, size), params), shape)

    def dequantize_rows(self, tensors: dict[str, Tensor], shape: tuple[int, int], rows: Tensor) -> Tensor:
        """Decode some rows of a packed matrix at the cost of those rows alone.

        Args:
            tensors: as returned by `pack`.
            shape: (rows, columns) of the whole matrix.
            rows: int64 (n,).

        Returns:
            fp32 (n, columns).
        """
        return self.rows_of(self.unpack_codes(tensors["codes"][rows], shape[1]), tensors, shape, rows)

    def rows_of(self, codes: Tensor, tensors: dict[str, Tensor], shape: tuple[int, int], rows: Tensor) -> Tensor:
        """Decode some rows from their unpacked codes and the packed parameters.

        Args:
            codes: (n, codes_in(columns)).
            tensors: as returned by `pack`; only the parameters are read.
            shape: (rows, columns) of the whole matrix.
            rows: int64 (n,).

        Returns:
            fp32 (n, columns).
        """
        if not rows.numel():
            return torch.empty(0, shape[1], device=rows.device)
        params = {part.name: part.unpack_rows(tensors[part.name], rows) for part in self.parts(shape)}
        return self.dequantize(codes, params, (rows.shape[0], shape[1]))
