"""Memory layout of a page: 32 tokens of a layer, keys and values, as one record of 32-bit words.

The parts follow each other, each aligned to a word; parts that a scheme has no use for are absent.

    key.codes            (heads, 2, words, 16)   a lane is a token of a half page; its bit stream runs along the
                                                 head's channels, lowest bits first, codes may straddle words
    key.scale, .zero     (heads dim) fp16 per page, or (groups, 32) fp16 per token
    key.outlier_value    (n, 32) fp16            added to the decoded number
    key.outlier_index    (n, 32) uint8, or uint16 with more than 256 channels
    value.codes          (heads, blocks, bits, 16)   a lane is one of 16 channels; its stream runs along 32 tokens
    value.*              as for keys

A lane is an element of a vector register, so that kernels load whole vectors: tokens for the scores, channels for
the weighted sum of values.
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
    """Part of a page: position in words, shape and type."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def words(self) -> int:
        """Return the words it occupies."""
        return -(-prod(self.shape) * _BYTES[self.dtype] // 4)

    def view(self, pages: Tensor) -> Tensor:
        """Return a view (..., *shape) of the part in pages (..., words)."""
        count = prod(self.shape)
        part = pages[..., self.offset : self.offset + self.words].view(self.dtype)
        return part[..., :count].unflatten(-1, self.shape)


class PageLayout:
    """Layout of the pages of a layer.

    Args:
        scheme: storage scheme.
        heads: key/value heads.
        dim: head dimension.

    Attributes:
        parts: name -> part, in order.
        words: 32-bit words of a page.

    Raises:
        RecipeError: heads of this size do not suit the scheme.
    """

    def __init__(self, scheme: Scheme, heads: int, dim: int) -> None:
        self.scheme, self.heads, self.dim = scheme, heads, dim
        self.parts: dict[str, PagePart] = {}
        self.words = 0
        blocks = -(-dim // LANES)
        self._add("key.codes", (heads, PAGE // LANES, words_for(dim, scheme.keys.bits), LANES), torch.int32)
        self._add_parameters("key", scheme.keys)
        self._add("value.codes", (heads, blocks, scheme.values.bits, LANES), torch.int32)
        self._add_parameters("value", scheme.values)

    def _add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.parts[name] = PagePart(self.words, shape, dtype)
        self.words += self.parts[name].words

    def _add_parameters(self, tensor: str, scheme: TensorScheme) -> None:
        channels = self.heads * self.dim
        if not scheme.is_static:
            shape = (channels,) if scheme.axis == "page" else (scheme.num_groups(self.heads, self.dim), PAGE)
            self._add(f"{tensor}.scale", shape, torch.float16)
            if scheme.has_zero:
                self._add(f"{tensor}.zero", shape, torch.float16)
        if count := scheme.num_outliers(channels):
            self._add(f"{tensor}.outlier_value", (count, PAGE), torch.float16)
            self._add(f"{tensor}.outlier_index", (count, PAGE), torch.uint8 if channels <= 256 else torch.uint16)

    def write(self, pages: Tensor, keys: EncodedPages, values: EncodedPages) -> None:
        """Write encoded keys and values.

        Args:
            pages: int32 (rows, pages, words), written to.
            keys: encoded keys of these pages.
            values: encoded values of these pages.
        """
        codes = keys.codes.unflatten(-1, (self.heads, self.dim)).unflatten(2, (-1, LANES))
        packed = pack(codes.permute(0, 1, 4, 2, 3, 5), self.scheme.keys.bits)
        self.parts["key.codes"].view(pages).copy_(packed.transpose(-1, -2))
        codes = values.codes.unflatten(-1, (self.heads, self.dim))
        codes = torch.nn.functional.pad(codes, (0, -self.dim % LANES)).unflatten(-1, (-1, LANES))
        packed = pack(codes.permute(0, 1, 3, 4, 5, 2), self.scheme.values.bits)
        self.parts["value.codes"].view(pages).copy_(packed.transpose(-1, -2))
        self._write_parameters("key", self.scheme.keys, pages, keys)
        self._write_parameters("value", self.scheme.values, pages, values)

    def _write_parameters(self, tensor: str, scheme: TensorScheme, pages: Tensor, encoded: EncodedPages) -> None:
        for name in ("scale", "zero"):
            values = getattr(encoded, name)
            if values is not None:
                self.parts[f"{tensor}.{name}"].view(pages).copy_(values if scheme.axis == "page" else values.mT)
        if encoded.outlier_value is not None and encoded.outlier_index is not None:
            self.parts[f"{tensor}.outlier_value"].view(pages).copy_(encoded.outlier_value.mT)
            self.parts[f"{tensor}.outlier_index"].view(pages).copy_(encoded.outlier_index.mT)

    def read(self, pages: Tensor) -> tuple[EncodedPages, EncodedPages]:
        """Return the encoded keys and values of pages (rows, pages, words)."""
        streams = self.parts["key.codes"].view(pages).transpose(-1, -2)
        codes = unpack(streams.contiguous(), self.scheme.keys.bits, self.dim)  # (r, p, heads, 2, 16, dim)
        keys = codes.permute(0, 1, 3, 4, 2, 5).flatten(4).flatten(2, 3)
        streams = self.parts["value.codes"].view(pages).transpose(-1, -2)
        codes = unpack(streams.contiguous(), self.scheme.values.bits, PAGE)  # (r, p, heads, blocks, 16, 32)
        values = codes.flatten(3, 4)[:, :, :, : self.dim].permute(0, 1, 4, 2, 3).flatten(3)
        return (
            self._read_parameters("key", self.scheme.keys, pages, keys),
            self._read_parameters("value", self.scheme.values, pages, values),
        )

    def _read_parameters(self, tensor: str, scheme: TensorScheme, pages: Tensor, codes: Tensor) -> EncodedPages:
        def part(name: str, is_transposed: bool, dtype: torch.dtype = torch.float32) -> Tensor | None:
            place = self.parts.get(f"{tensor}.{name}")
            if place is None:
                return None
            values = place.view(pages)
            return (values.mT if is_transposed else values).to(dtype)

        per_token = scheme.axis == "token"
        return EncodedPages(
            codes,
            part("scale", per_token),
            part("zero", per_token),
            part("outlier_value", True),
            part("outlier_index", True, torch.int64),
        )

    def invalid_outlier_channel(self, pages: Tensor) -> int | None:
        """Return an outlier index in `pages` beyond the layer's channels; None if all are valid."""
        for tensor in ("key", "value"):
            part = self.parts.get(f"{tensor}.outlier_index")
            if part is not None and pages.numel():
                largest = int(part.view(pages).to(torch.int32).amax())
                if largest >= self.heads * self.dim:
                    return largest
        return None
