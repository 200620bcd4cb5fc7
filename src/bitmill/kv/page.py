"""A page: 32 tokens of a layer, keys and values, as one record of 32-bit words.

Parts follow each other, each from a word on; those that a scheme has no use for are absent.

    key.codes            (heads, 2, words, 16)   a lane is a token of a half of the page; its stream runs along the
                                                 head's channels, lowest bits first, codes cut by words
    key.scale, .zero     (heads dim) fp16 per page, or (groups, 32) fp16 per token
    key.outlier_value    (n, 32) fp16            added to the decoded number
    key.outlier_index    (n, 32) uint8, or uint16 where there are more than 256 channels
    value.codes          (heads, blocks, bits, 16)   a lane is one of 16 channels; its stream runs along 32 tokens
    value.*              as for keys

Lanes are what one vector instruction takes, so that a kernel reads whole vectors: tokens for the scores,
channels for the sum of values.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from bitmill.kv.codec import EncodedPages
from bitmill.kv.scheme import PAGE, Scheme, TensorScheme
from bitmill.numerics.packing import pack, unpack, words_for

LANES = 16
_BYTES = {torch.int32: 4, torch.float16: 2, torch.uint8: 1, torch.uint16: 2}


@dataclass(frozen=True)
class PagePart:
    """A part of a page: its place in words, and what is there."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def words(self) -> int:
        """Words that it takes."""
        return -(-prod(self.shape) * _BYTES[self.dtype] // 4)

    def of(self, pages: Tensor) -> Tensor:
        """A view of the part in pages (..., words), shaped (..., *shape)."""
        count = prod(self.shape)
        part = pages[..., self.offset : self.offset + self.words].view(self.dtype)
        return part[..., :count].unflatten(-1, self.shape)


class PageLayout:
    """Where everything is in a page of a layer with `heads` heads of `dim` numbers."""

    def __init__(self, scheme: Scheme, heads: int, dim: int) -> None:
        self.scheme, self.heads, self.dim = scheme, heads, dim
        self.parts: dict[str, PagePart] = {}
        self.words = 0
        blocks = -(-dim // LANES)
        self._add("key.codes", (heads, PAGE // LANES, words_for(dim, scheme.keys.bits), LANES), torch.int32)
        self._add_side("key", scheme.keys)
        self._add("value.codes", (heads, blocks, scheme.values.bits, LANES), torch.int32)
        self._add_side("value", scheme.values)

    def _add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.parts[name] = PagePart(self.words, shape, dtype)
        self.words += self.parts[name].words

    def _add_side(self, name: str, side: TensorScheme) -> None:
        channels = self.heads * self.dim
        if not side.is_fixed:
            own = (channels,) if side.axis == "page" else (side.groups(self.heads, self.dim), PAGE)
            self._add(f"{name}.scale", own, torch.float16)
            if side.has_zero:
                self._add(f"{name}.zero", own, torch.float16)
        if count := side.outlier_count(channels):
            self._add(f"{name}.outlier_value", (count, PAGE), torch.float16)
            self._add(f"{name}.outlier_index", (count, PAGE), torch.uint8 if channels <= 256 else torch.uint16)

    def write(self, pages: Tensor, keys: EncodedPages, values: EncodedPages) -> None:
        """Fill pages (rows, pages, words) int32."""
        codes = keys.codes.unflatten(-1, (self.heads, self.dim)).unflatten(2, (-1, LANES))
        packed = pack(codes.permute(0, 1, 4, 2, 3, 5), self.scheme.keys.bits)
        self.parts["key.codes"].of(pages).copy_(packed.transpose(-1, -2))
        codes = values.codes.unflatten(-1, (self.heads, self.dim))
        codes = torch.nn.functional.pad(codes, (0, -self.dim % LANES)).unflatten(-1, (-1, LANES))
        packed = pack(codes.permute(0, 1, 3, 4, 5, 2), self.scheme.values.bits)
        self.parts["value.codes"].of(pages).copy_(packed.transpose(-1, -2))
        self._write_side("key", self.scheme.keys, pages, keys)
        self._write_side("value", self.scheme.values, pages, values)

    def _write_side(self, name: str, side: TensorScheme, pages: Tensor, coded: EncodedPages) -> None:
        for part in ("scale", "zero"):
            found = getattr(coded, part)
            if found is not None:
                self.parts[f"{name}.{part}"].of(pages).copy_(found if side.axis == "page" else found.mT)
        if coded.outlier_value is not None and coded.outlier_index is not None:
            self.parts[f"{name}.outlier_value"].of(pages).copy_(coded.outlier_value.mT)
            self.parts[f"{name}.outlier_index"].of(pages).copy_(coded.outlier_index.mT)

    def read(self, pages: Tensor) -> tuple[EncodedPages, EncodedPages]:
        """Keys and values of pages (rows, pages, words)."""
        streams = self.parts["key.codes"].of(pages).transpose(-1, -2)
        codes = unpack(streams.contiguous(), self.scheme.keys.bits, self.dim)  # (r, p, heads, 2, 16, dim)
        keys = codes.permute(0, 1, 3, 4, 2, 5).flatten(4).flatten(2, 3)
        streams = self.parts["value.codes"].of(pages).transpose(-1, -2)
        codes = unpack(streams.contiguous(), self.scheme.values.bits, PAGE)  # (r, p, heads, blocks, 16, 32)
        values = codes.flatten(3, 4)[:, :, :, : self.dim].permute(0, 1, 4, 2, 3).flatten(3)
        return self._read_side("key", self.scheme.keys, pages, keys), self._read_side(
            "value", self.scheme.values, pages, values
        )

    def _read_side(self, name: str, side: TensorScheme, pages: Tensor, codes: Tensor) -> EncodedPages:
        def part(which: str) -> Tensor | None:
            place = self.parts.get(f"{name}.{which}")
            return None if place is None else place.of(pages)

        def turned(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.mT

        scale, zero = part("scale"), part("zero")
        if side.axis == "token":
            scale, zero = turned(scale), turned(zero)
        value, index = turned(part("outlier_value")), turned(part("outlier_index"))
        return EncodedPages(
            codes,
            None if scale is None else scale.float(),
            None if zero is None else zero.float(),
            None if value is None else value.float(),
            None if index is None else index.to(torch.int64),
        )
