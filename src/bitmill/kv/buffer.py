"""Tokens of one layer: packed pages, and an fp16 buffer for attention sinks and recent tokens.

Slots count appended tokens from 0. Every token passes through fp16, so that the stored bytes do not depend on
how many tokens were appended at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bitmill.kv.codec import CalibratedParams, TensorCodec
from bitmill.kv.page import PageLayout
from bitmill.kv.rope import Rope
from bitmill.kv.scheme import PAGE, Scheme

SLAB = 8  # pages allocated at a time
_APPEND_CHUNK = SLAB * PAGE  # tokens appended at a time: bounds the memory that packing a long prompt takes
_DECODE_CHUNK = 1024  # tokens decoded at a time: bounds the memory needed in addition to the result
_FP16_MAX = 65504.0


class PageStore:
    """Packed pages of a layer, in slabs of a fixed number of pages: growing allocates one more and copies nothing.

    Args:
        layout: of a page.
        keys, values: codecs.
        rows: sequences.
        device: of the slabs.

    Attributes:
        slabs: int32 (rows, SLAB, words) each; the last may be used in part.
        first: slot of the first token that is still stored, a multiple of 32.
        num_pages: pages in use.
    """

    def __init__(
        self, layout: PageLayout, keys: TensorCodec, values: TensorCodec, rows: int, device: torch.device
    ) -> None:
        self.layout, self.keys, self.values = layout, keys, values
        self.rows, self.device = rows, device
        self.slabs: list[Tensor] = []
        self.first = 0
        self.num_pages = 0

    @property
    def end(self) -> int:
        """Return the slot after the last packed token."""
        return self.first + self.num_pages * PAGE

    @property
    def allocated_bytes(self) -> int:
        """Return the bytes of all slabs."""
        return sum(slab.numel() * 4 for slab in self.slabs)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Encode and append whole pages.

        Args:
            keys: (rows, tokens, channels) in the storage basis; tokens is a multiple of 32.
            values: of that shape.
        """
        done, count = 0, keys.shape[1] // PAGE
        while done < count:
            place = self._next_place()
            step = min(SLAB - place, count - done)
            tokens = slice(done * PAGE, (done + step) * PAGE)
            pages = self.slabs[-1][:, place : place + step]
            self.layout.write(pages, self.keys.encode(keys[:, tokens]), self.values.encode(values[:, tokens]))
            self.num_pages, done = self.num_pages + step, done + step

    def append_encoded(self, page: Tensor) -> None:
        """Append a page (rows, words) that is encoded already."""
        place = self._next_place()
        self.slabs[-1][:, place] = page
        self.num_pages += 1

    def _next_place(self) -> int:
        """Return the index of the next page in the last slab, after allocating a slab if that one is full."""
        place = self.num_pages % SLAB
        if place == 0:
            self.slabs.append(self._new_slab())
        return place

    def _new_slab(self) -> Tensor:
        with torch.inference_mode(False):  # a tensor made in inference mode cannot be written to outside of it
            return torch.zeros(self.rows, SLAB, self.layout.words, dtype=torch.int32, device=self.device)

    def read(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Decode keys and values, fp32 (rows, tokens, channels), of the slots between two page borders."""
        begin, stop = (first - self.first) // PAGE, (end - self.first) // PAGE
        pieces = []
        for at in range(begin // SLAB, -(-stop // SLAB)):
            pages = slice(max(begin - at * SLAB, 0), min(stop - at * SLAB, SLAB))
            pieces.append(self.slabs[at][:, pages])
        if not pieces or begin >= stop:
            empty = torch.empty(self.rows, 0, self.keys.channels, device=self.device)
            return empty, empty
        keys, values = self.layout.read(torch.cat(pieces, 1))
        return self.keys.decode(keys), self.values.decode(values)

    def used_pages(self) -> Tensor:
        """Return a copy of the pages in use, (rows, pages, words)."""
        empty = torch.empty(self.rows, 0, self.layout.words, dtype=torch.int32, device=self.device)
        return torch.cat([empty, *self.slabs], 1)[:, : self.num_pages].contiguous()

    def restore(self, pages: Tensor, first: int) -> None:
        """Fill an empty store with pages that `used_pages` returned, the first of them at slot `first`."""
        self.first, self.num_pages = first, pages.shape[1]
        for part in pages.split(SLAB, 1) if self.num_pages else ():
            slab = self._new_slab()
            slab[:, : part.shape[1]] = part
            self.slabs.append(slab)

    def truncate(self, end: int) -> None:
        """Drop the pages from slot `end` on, a page border."""
        self.num_pages = max(0, (end - self.first) // PAGE)
        del self.slabs[-(-self.num_pages // SLAB) :]

    def evict(self, first: int) -> None:
        """Free the slabs whose slots all precede `first`."""
        count = min((first - self.first) // (PAGE * SLAB), self.num_pages // SLAB)
        if count > 0:
            del self.slabs[:count]
            self.first, self.num_pages = self.first + count * SLAB * PAGE, self.num_pages - count * SLAB

    def map_batch(self, change: Callable[[Tensor], Tensor], rows: int) -> None:
        """Replace the rows of every slab.

        Args:
            change: maps a tensor (rows, ...) to its new rows.
            rows: number of new rows.
        """
        self.slabs, self.rows = [change(slab) for slab in self.slabs], rows


class TokenBuffer:
    """Keys and values of `rows` sequences.

    Args:
        scheme: storage scheme.
        params: calibrated parameters of keys and values.
        rope: rotary embedding of the layer that is undone before keys are stored; None if none is.

    Attributes:
        length: slots in use, padding included.
        start: (rows,) int32, slot of each row's first token; the slots before it are padding.
        fp16_buffer: (2, rows, heads, sink + residual + 32, dim): keys, after RoPE, and values of each row's
            attention sinks, then of the tokens that are not packed yet, in the storage basis
            (`TensorCodec.to_storage_basis`).
        version: incremented when tokens are dropped or moved; appending leaves it as it is.
    """

    fp16_buffer: Tensor

    def __init__(
        self, scheme: Scheme, params: tuple[CalibratedParams, CalibratedParams], rope: Rope | None
    ) -> None:
        self.scheme, self.params, self.rope = scheme, params, rope
        self.version = 0
        self.clear()

    def clear(self) -> None:
        """Drop all tokens and free their memory."""
        self.version += 1
        self.length = 0
        self.store: PageStore | None = None
        self.start: Tensor | None = None
        self._last_start = 0

    def allocate(self, rows: int, heads: int, dim: int, device: torch.device) -> None:
        """Allocate an empty buffer.

        Args:
            rows: sequences.
            heads: key/value heads.
            dim: head dimension.
            device: of all tensors.

        Raises:
            RecipeError: heads of this size do not suit the scheme.
        """
        self.heads, self.dim, self.device = heads, dim, device
        keys, values = (
            TensorCodec.from_params(scheme, heads, dim, params, device)
            for scheme, params in zip((self.scheme.keys, self.scheme.values), self.params, strict=True)
        )
        self.store = PageStore(PageLayout(self.scheme, heads, dim), keys, values, rows, device)
        if self.start is None:
            self.set_start(torch.zeros(rows, dtype=torch.int32, device=device))
        shape = (2, rows, heads, self.scheme.sink + self.scheme.buffer_size, dim)
        with torch.inference_mode(False):  # a tensor made in inference mode cannot be written to outside of it
            self.fp16_buffer = torch.zeros(shape, dtype=torch.float16, device=device)

    def skip_to(self, slot: int) -> None:
        """Start an empty buffer at a later slot: the tokens before it left the sliding window elsewhere."""
        self.pages.first = self.length = slot // PAGE * PAGE
        missing = self.fp16_buffer.new_zeros(2, *self.fp16_buffer.shape[1:3], slot - self.length, self.dim)
        self.append(missing[0], missing[1])

    def set_start(self, start: Tensor) -> None:
        """Set the slot at which each row begins, (rows,) integers."""
        self.version += 1
        self.start, self._last_start = start.to(torch.int32).contiguous(), int(start.max())

    def restore(self, pages: Tensor, fp16_buffer: Tensor, start: Tensor, length: int, first: int) -> None:
        """Fill an allocated, empty buffer with saved tokens.

        Args:
            pages: int32 (rows, pages, words).
            fp16_buffer: of the shape of the attribute.
            start: (rows,), of the attribute.
            length: slots in use.
            first: slot of the first page.
        """
        self.set_start(start)
        self.length = length
        self.fp16_buffer.copy_(fp16_buffer)
        self.pages.restore(pages, first)

    @property
    def pages(self) -> PageStore:
        """Return the packed pages of an allocated buffer."""
        assert self.store is not None
        return self.store

    @property
    def has_tokens(self) -> bool:
        """Return True if every row has a token that is no padding."""
        return self._last_start < self.length

    @property
    def is_padded(self) -> bool:
        """Return True if a row begins with padding."""
        return self._last_start > 0

    @property
    def num_unpacked(self) -> int:
        """Return the tokens in fp16 that are not packed yet."""
        return self.length - self.pages.end

    @property
    def allocated_bytes(self) -> int:
        """Return the bytes of the pages and the fp16 buffer."""
        return 0 if self.store is None else self.store.allocated_bytes + self.fp16_buffer.numel() * 2

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Append tokens, and pack all full pages but the last.

        Args:
            keys: (rows, heads, tokens, dim), after RoPE.
            values: of that shape.
        """
        states = keys.detach(), values.detach()
        for at in range(0, keys.shape[-2], _APPEND_CHUNK):
            is_whole = not at and keys.shape[-2] <= _APPEND_CHUNK
            self._append_chunk(states if is_whole else [x[..., at : at + _APPEND_CHUNK, :] for x in states])

    def _append_chunk(self, states: Sequence[Tensor]) -> None:
        if self.has_storage_basis:
            states = self._to_storage_basis(states)
        unpacked, new = self.num_unpacked, states[0].shape[-2]
        self.length += new
        if unpacked + new <= self.scheme.buffer_size:
            self._write_buffer(states, unpacked)
            return
        sink = self.scheme.sink
        before = self.fp16_buffer[:, :, :, sink : sink + unpacked]
        joined = [torch.cat([old, _to_fp16(x)], -2) for old, x in zip(before, states)]
        self._pack_first(joined, (unpacked + new - self.scheme.residual - 1) // PAGE * PAGE)

    @property
    def is_full(self) -> bool:
        """Return True if the fp16 buffer has no room for a token before a page is packed."""
        return self.store is not None and self.num_unpacked == self.scheme.buffer_size

    def pack_full_page(self) -> None:
        """Pack the page that is full, if one is: otherwise it is packed when the next token is appended."""
        if self.is_full:
            self._pack_first(list(self.fp16_buffer[:, :, :, self.scheme.sink :].clone()), PAGE)

    def full_page(self) -> Tensor:
        """Return the page to be packed next, a view (2, rows, heads, 32, dim) in fp16, keys after RoPE."""
        sink = self.scheme.sink
        return self.fp16_buffer[:, :, :, sink : sink + PAGE]

    def replace_full_page(self, page: Tensor) -> None:
        """Replace the page to be packed next, in the fp16 buffer, by its encoded `page` (rows, words)."""
        self.pages.append_encoded(page)
        if self.scheme.residual:
            sink = self.scheme.sink
            recent = self.fp16_buffer[:, :, :, sink + PAGE :].clone()
            self.fp16_buffer[:, :, :, sink : sink + self.scheme.residual] = recent

    def _pack_first(self, states: list[Tensor], count: int) -> None:
        self._keep_sinks(states, count)
        self._pack(*(x[..., :count, :].float() for x in states))
        self._write_buffer([x[..., count:, :] for x in states], 0)

    def _write_buffer(self, states: Sequence[Tensor], place: int) -> None:
        begin = self.scheme.sink + place
        target = self.fp16_buffer[:, :, :, begin : begin + states[0].shape[-2]]
        for which in (0, 1):
            target[which].copy_(states[which].clamp(-_FP16_MAX, _FP16_MAX))

    def _keep_sinks(self, states: list[Tensor], count: int) -> None:
        """Copy the attention sinks among the first `count` tokens of `states`, which are about to be packed."""
        for i, rows, slot in self._sinks(self.pages.end, count):
            for which in (0, 1):
                self.fp16_buffer[which, rows, :, i] = states[which][rows, :, slot]

    def _sinks(self, first: int, count: int) -> list[tuple[int, Tensor, Tensor]]:
        """Return the attention sinks in `count` slots from `first` on: number, rows, and slots minus `first`."""
        if self.start is None or first >= self._last_start + self.scheme.sink:
            return []
        found = []
        for i in range(self.scheme.sink):
            place = self.start.long() + i - first
            rows = ((place >= 0) & (place < count)).nonzero()[:, 0]
            found.append((i, rows, place[rows]))
        return found

    def _pack(self, keys: Tensor, values: Tensor) -> None:
        first, count = self.pages.end, keys.shape[-2]
        if first < self._last_start and self.start is not None:  # padding must not widen the range of a page
            slots = torch.arange(first, first + count, device=self.device)
            place = torch.maximum(slots, self.start[:, None]).clamp_(max=first + count - 1) - first
            index = place[:, None, :, None].expand_as(keys)
            keys, values = keys.gather(2, index), values.gather(2, index)
        if self.scheme.pre_rope and self.rope is not None:
            keys = self.rope.undo(keys, self._positions(first, count))
        self.pages.append(keys.transpose(1, 2).flatten(2), values.transpose(1, 2).flatten(2))

    def _positions(self, first: int, count: int) -> Tensor:
        """Return the positions of `count` slots, (1, count), or (rows, count) with padding."""
        assert self.start is not None
        slots = torch.arange(first, first + count, device=self.device)[None]
        return slots - self.start[:, None] if self._last_start else slots

    @property
    def has_storage_basis(self) -> bool:
        """Return True if keys or values are stored in another basis than the model's."""
        return self.pages.keys.has_storage_basis or self.pages.values.has_storage_basis

    def _to_storage_basis(self, states: Sequence[Tensor] | Tensor) -> list[Tensor]:
        codecs = (self.pages.keys, self.pages.values)
        return [codec.to_storage_basis(x) for codec, x in zip(codecs, states)]

    def _from_storage_basis(self, states: Sequence[Tensor] | Tensor) -> list[Tensor]:
        codecs = (self.pages.keys, self.pages.values)
        return [codec.from_storage_basis(x) for codec, x in zip(codecs, states)]

    def read(self, first: int, room: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Decode the tokens from a slot on.

        Args:
            first: slot.
            room: further slots to allocate after the tokens, for the caller to fill.
            dtype: of the result.

        Returns:
            Keys, after RoPE, and values, (2, rows, heads, tokens + room, dim).
        """
        end, sink = self.pages.end, self.scheme.sink
        shape = (2, *self.fp16_buffer.shape[1:3], self.length - first + room, self.dim)
        states = torch.empty(shape, dtype=dtype, device=self.device)
        for at in range(max(first // PAGE * PAGE, self.pages.first), end, _DECODE_CHUNK):
            stop, begin = min(at + _DECODE_CHUNK, end), max(at, first)
            states[..., begin - first : stop - first, :] = self.read_pages(at, stop)[..., begin - at :, :]
        unpacked = self.fp16_buffer[:, :, :, sink + max(0, first - end) : sink + self.num_unpacked]
        for target, x in zip(states, self._from_storage_basis(unpacked), strict=True):
            target[..., max(0, end - first) : self.length - first, :] = x
        return states

    def read_pages(self, first: int, end: int) -> Tensor:
        """Decode packed slots between two page borders; attention sinks are exact.

        Args:
            first: first slot, a page border.
            end: slot after the last, a page border.

        Returns:
            Keys, after RoPE, and values, fp32 (2, rows, heads, tokens, dim).
        """
        keys, values = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in self.pages.read(first, end))
        if self.scheme.pre_rope and self.rope is not None:
            keys = self.rope.apply(keys, self._positions(first, end - first))
        states = torch.stack([keys, values])
        for i, rows, slot in self._sinks(first, end - first):
            states[:, rows, :, slot] = self.fp16_buffer[:, rows, :, i].float().transpose(0, 1)
        return torch.stack(self._from_storage_basis(states)) if self.has_storage_basis else states

    def truncate(self, length: int) -> None:
        """Keep the first `length` slots; the rest of a page that is cut returns to the fp16 buffer."""
        self.version += 1
        if length < self.pages.end:
            border = length // PAGE * PAGE
            cut = self.read_pages(border, border + PAGE)[..., : length - border, :]
            self.pages.truncate(border)
            self._write_buffer(self._to_storage_basis(cut), 0)
        self.length = length

    def evict(self, first: int) -> None:
        """Free the memory of slots before `first`, in whole slabs."""
        self.version += 1
        self.pages.evict(first)

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace the rows: `change` maps a tensor (rows, ...) to its new rows."""
        self.version += 1
        with torch.inference_mode(False), torch.no_grad():
            if self.store is not None:
                self.fp16_buffer = torch.stack([change(states) for states in self.fp16_buffer])
                self.store.map_batch(change, self.fp16_buffer.shape[1])
            if self.start is not None:
                self.set_start(change(self.start))


def _to_fp16(x: Tensor) -> Tensor:
    return x.clamp(-_FP16_MAX, _FP16_MAX).to(torch.float16)
