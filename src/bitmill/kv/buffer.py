"""The tokens of one layer: packed pages, and a few in fp16, the first of each sequence and those that wait.

Slots count appended tokens from 0. Every token passes through fp16, so that what is stored does not depend on how
many came at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bitmill.kv.codec import CalibratedParams, TensorCodec
from bitmill.kv.page import PageLayout
from bitmill.kv.rope import Rope
from bitmill.kv.scheme import PAGE, Scheme
from bitmill.kv.store import SLAB, PageStore

_STEP = SLAB * PAGE  # tokens taken in at a time: a long prompt is packed in little memory
_PART = 1024  # tokens decoded at a time: what that needs besides the floats stays small
_MOST = 65504.0  # of fp16


class TokenBuffer:
    """Keys and values of `rows` sequences in slots.

    start: (rows,) int32, where each row begins; what comes before is padding.
    loose: fp16 (2, rows, heads, sink + residual + 32, dim): keys, after RoPE, and values of the first tokens of
        each row, then of those that wait, in the basis that is stored (Coder.moved).
    changes: how often tokens were forgotten or put elsewhere; appending changes nothing.
    """

    def __init__(
        self, scheme: Scheme, calibrated: tuple[CalibratedParams, CalibratedParams], rope: Rope | None
    ) -> None:
        self.scheme, self.calibrated, self.rope = scheme, calibrated, rope
        self.version = 0
        self.clear()

    def clear(self) -> None:
        """Forget all tokens, and free their memory."""
        self.version += 1
        self.length = 0
        self.store: PageStore | None = None
        self.start: Tensor | None = None
        self._last_start = 0

    def open(self, rows: int, heads: int, dim: int, device: torch.device) -> None:
        """Make room. Raises RecipeError where heads of this size cannot be stored so."""
        self.heads, self.dim, self.device = heads, dim, device
        keys, values = (
            TensorCodec(side, heads, dim, calibrated, device)
            for side, calibrated in zip((self.scheme.keys, self.scheme.values), self.calibrated, strict=True)
        )
        self.store = PageStore(PageLayout(self.scheme, heads, dim), keys, values, rows, device)
        if self.start is None:
            self.begin(torch.zeros(rows, dtype=torch.int32, device=device))
        room = (2, rows, heads, self.scheme.sink + self.scheme.tail, dim)
        with torch.inference_mode(False):  # a tensor made in that mode can be written to in no other
            self.fp16_buffer = torch.zeros(room, dtype=torch.float16, device=device)

    def skip(self, slots: int) -> None:
        """Begin at a later slot, right after `open`: tokens before it slid out of sight elsewhere."""
        self.pages.first = self.length = slots // PAGE * PAGE
        missing = self.fp16_buffer.new_zeros(2, *self.fp16_buffer.shape[1:3], slots - self.length, self.dim)
        self.add(missing[0], missing[1])

    def begin(self, start: Tensor) -> None:
        """Say at which slot each row begins, (rows,) integers."""
        self.version += 1
        self.start, self._last_start = start.to(torch.int32).contiguous(), int(start.max())

    @property
    def pages(self) -> PageStore:
        """The packed part."""
        assert self.store is not None
        return self.store

    @property
    def has_begun(self) -> bool:
        """Whether there is a token in every row that is no padding."""
        return self._last_start < self.length

    @property
    def is_padded(self) -> bool:
        """Whether a row begins with padding."""
        return self._last_start > 0

    @property
    def num_unpacked(self) -> int:
        """Tokens in fp16 that are not packed yet."""
        return self.length - self.pages.end

    @property
    def bytes(self) -> int:
        """Everything that is allocated: pages, and the room for tokens in fp16."""
        return 0 if self.store is None else self.store.bytes + self.fp16_buffer.numel() * 2

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Take in keys, after RoPE, and values (rows, heads, tokens, dim); full pages but the last are packed."""
        states = keys.detach(), values.detach()
        for at in range(0, keys.shape[-2], _STEP):
            self._take([x[..., at : at + _STEP, :] for x in states] if at or keys.shape[-2] > _STEP else states)

    def _take(self, states: list[Tensor] | tuple[Tensor, Tensor]) -> None:
        if self.is_turned:
            states = self._turned(states)
        num_unpacked, new = self.num_unpacked, states[0].shape[-2]
        self.length += new
        if num_unpacked + new <= self.scheme.tail:
            self._wait(states, num_unpacked)
            return
        sink = self.scheme.sink
        before = self.fp16_buffer[:, :, :, sink : sink + num_unpacked]
        states = [torch.cat([old, _in_half(x)], -2) for old, x in zip(before, states)]
        self._pack_first(states, (num_unpacked + new - self.scheme.residual - 1) // PAGE * PAGE)

    def pack_full_page(self) -> None:
        """Pack the page that is full: without this it waits for the next token."""
        if self.store is not None and self.num_unpacked == self.scheme.tail:
            self._pack_first(list(self.fp16_buffer[:, :, :, self.scheme.sink :].clone()), PAGE)

    def _pack_first(self, states: list[Tensor], packed: int) -> None:
        self._keep_sinks(states, packed)
        self._pack(*(x[..., :packed, :].float() for x in states))
        self._wait([x[..., packed:, :] for x in states], 0)

    def _wait(self, states: list[Tensor] | tuple[Tensor, Tensor], place: int) -> None:
        begin = self.scheme.sink + place
        room = self.fp16_buffer[:, :, :, begin : begin + states[0].shape[-2]]
        for side in (0, 1):
            room[side].copy_(states[side].clamp(-_MOST, _MOST))

    def _keep_sinks(self, states: list[Tensor], packed: int) -> None:
        """Copy what leaves for the pages and is among the first tokens of its row."""
        for i, rows, slot in self._sinks(self.pages.end, packed):
            for side in (0, 1):
                self.fp16_buffer[side, rows, :, i] = states[side][rows, :, slot]

    def _sinks(self, first: int, count: int) -> list[tuple[int, Tensor, Tensor]]:
        """The sinks in `count` slots from `first` on: number, rows, and places among these slots."""
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
        assert self.start is not None
        if not self._last_start:
            return torch.arange(first, first + count, device=self.device)[None]
        return torch.arange(first, first + count, device=self.device)[None] - self.start[:, None]

    @property
    def is_turned(self) -> bool:
        """Whether heads are stored in another basis than the model's."""
        return self.pages.keys.has_storage_basis or self.pages.values.has_storage_basis

    def _turned(self, states: list[Tensor] | tuple[Tensor, ...] | Tensor, back: bool = False) -> list[Tensor]:
        """Keys and values in the basis that is stored, or back in the model's, fp32."""
        coders = (self.pages.keys, self.pages.values)
        return [
            coder.from_storage_basis(x) if back else coder.to_storage_basis(x) for coder, x in zip(coders, states)
        ]

    def read(self, first: int, room: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Keys, after RoPE, and values from slot `first` on (2, rows, heads, tokens + room, dim).

        room: how many slots follow that the caller fills.
        """
        end, sink = self.pages.end, self.scheme.sink
        shape = (2, *self.fp16_buffer.shape[1:3], self.length - first + room, self.dim)
        states = torch.empty(shape, dtype=dtype, device=self.device)
        for at in range(max(first // PAGE * PAGE, self.pages.first), end, _PART):
            stop, begin = min(at + _PART, end), max(at, first)
            states[..., begin - first : stop - first, :] = self.read_pages(at, stop)[..., begin - at :, :]
        num_unpacked = self.fp16_buffer[:, :, :, sink + max(0, first - end) : sink + self.num_unpacked]
        for side, x in zip(states, self._turned(num_unpacked, back=True), strict=True):
            side[..., max(0, end - first) : self.length - first, :] = x
        return states

    def read_pages(self, first: int, end: int) -> Tensor:
        """The same of packed slots between two borders of pages; sinks are exact."""
        keys, values = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in self.pages.read(first, end))
        if self.scheme.pre_rope and self.rope is not None:
            keys = self.rope.apply(keys, self._positions(first, end - first))
        states = torch.stack([keys, values])
        for i, rows, slot in self._sinks(first, end - first):
            states[:, rows, :, slot] = self.fp16_buffer[:, rows, :, i].float().transpose(0, 1)
        return torch.stack(self._turned(states, back=True)) if self.is_turned else states

    def truncate(self, length: int) -> None:
        """Keep the first `length` slots; the rest of a page that is cut waits in fp16 again."""
        self.version += 1
        if length < self.pages.end:
            border = length // PAGE * PAGE
            cut: list[Tensor] | Tensor = self.read_pages(border, border + PAGE)[..., : length - border, :]
            self.pages.cut(border)
            self._wait(self._turned(cut), 0)
        self.length = length

    def evict(self, first: int) -> None:
        """Free what comes before slot `first`."""
        self.version += 1
        self.pages.evict(first)

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put other rows in the place of those there are: `change` takes and gives (rows, ...)."""
        self.version += 1
        with torch.inference_mode(False), torch.no_grad():
            if self.store is not None:
                self.fp16_buffer = torch.stack([change(side) for side in self.fp16_buffer])
                self.store.map_batch(change, self.fp16_buffer.shape[1])
            if self.start is not None:
                self.begin(change(self.start))


def _in_half(x: Tensor) -> Tensor:
    return x.clamp(-_MOST, _MOST).to(torch.float16)
