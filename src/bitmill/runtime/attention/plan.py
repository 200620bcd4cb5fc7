"""Layout of packed keys and values as the attention kernels read them (csrc/kv/kv.h, triton_attention.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from bitmill.native import native

AXES = ("static", "page", "token", "channel")  # csrc/kv/kv.h: KvAxis
BITS = (2, 3, 4, 8)
PAGE_TOKENS = 32


@dataclass(frozen=True)
class TensorPlan:
    """Layout of the keys or the values in a page: the first int32 word of each part, -1 for an absent part.

    Attributes:
        bits: Bits of a code.
        axis: Numbers that share a scale, one of AXES.
        groups: Scales of a token.
        outliers: Outliers of a token.
        codes: First word of the codes.
        scale: First word of the fp16 scales.
        zero: First word of the fp16 zeros.
        outlier_value: First word of the fp16 outliers.
        outlier_index: First word of the outliers' channels.
    """

    bits: int
    axis: str
    groups: int
    outliers: int
    codes: int
    scale: int = -1
    zero: int = -1
    outlier_value: int = -1
    outlier_index: int = -1

    def to_native(self) -> Any:
        """Return the layout as the extension's KvSide."""
        offsets = (self.codes, self.scale, self.zero, self.outlier_value, self.outlier_index)
        return native().KvSide(self.bits, AXES.index(self.axis), self.groups, self.outliers, *offsets)


@dataclass(frozen=True)
class PagePlan:
    """Layout of a page of 32 tokens: `words` int32 for `heads` heads of `dim` numbers (csrc/kv/kv.h)."""

    heads: int
    dim: int
    words: int
    key: TensorPlan
    value: TensorPlan

    def to_native(self) -> Any:
        """Return the layout as the extension's KvPages.

        It is not cached: an object that outlives the interpreter's modules is reported as leaked.
        """
        return native().KvPages(self.heads, self.dim, self.words, self.key.to_native(), self.value.to_native())


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """Everything of a layer's packed keys and values that stays constant from token to token.

    Queries passed to `attend` are in the basis in which keys are stored, and its result is in the basis of the
    values; the decode step changes the basis itself.

    Attributes:
        pages: Layout of a page.
        key_levels: fp32 (2**bits,), the numbers that codes of keys represent; (channels, 16) flattened, repeated,
            for axis "channel".
        value_levels: fp32 (2**bits,), of the values.
        key_scale: fp32 (heads * dim,), for axis "static".
        key_zero: fp32 (heads * dim,), for axis "static".
        inv_freq: fp64 (dim / 2,), radians per position, where keys are packed before RoPE.
        rope_scaling: Factor that RoPE multiplies these keys by.
        key_rotation: fp32 (dim, dim), basis in which the heads of keys are stored; None for the model's own.
        value_rotation: fp32 (dim, dim), of the values.
        value_mean: fp32 (heads * dim,).
        value_deviation: fp32 (heads * dim,).
    """

    pages: PagePlan
    key_levels: Tensor
    value_levels: Tensor
    key_scale: Tensor | None = None
    key_zero: Tensor | None = None
    inv_freq: Tensor | None = None
    rope_scaling: float = 1.0
    key_rotation: Tensor | None = None
    value_rotation: Tensor | None = None
    value_mean: Tensor | None = None
    value_deviation: Tensor | None = None

    @cached_property
    def native(self) -> Any:
        """The layer as the extension's KvLayer."""
        numbers = (self.key_levels, self.value_levels, self.key_scale, self.key_zero, self.inv_freq)
        return native().KvLayer(self.pages.to_native(), *numbers, self.rope_scaling)

    def block(self, tokens: Any) -> Any:
        """Return the KvBlock that the decode step reads and extends; tokens: from `NativeTokenViews.update`."""
        basis = (self.key_rotation, self.value_rotation, self.value_mean, self.value_deviation)
        return native().KvBlock(self.native, tokens, *(None if x is None else x.flatten() for x in basis))


@dataclass
class PackedPast:
    """The keys and values that a token attends to: first tokens in fp16, packed pages, last tokens in fp16.

    Attributes:
        slabs: int32 tensors (rows, pages, words), all with the same number of pages; the last may be partly used.
        first_slot: Slot of the first token of the first page.
        packed: Number of tokens in pages, a multiple of 32.
        fp16_keys: (rows, heads, room, dim), after RoPE: the `sinks` first tokens of each row, whose packed copies
            are not read, then the `tail` tokens that follow the packed ones.
        fp16_values: (rows, heads, room, dim).
        sinks: Number of first tokens in fp16.
        tail: Number of last tokens in fp16.
        start: int32 (rows,), slot of the first token that is not padding.
        first: int32 (rows,), first visible slot.
    """

    slabs: Sequence[Tensor]
    first_slot: int
    packed: int
    fp16_keys: Tensor
    fp16_values: Tensor
    sinks: int
    tail: int
    start: Tensor
    first: Tensor
