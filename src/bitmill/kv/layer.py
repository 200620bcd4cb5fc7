"""One layer's packed keys and values, as transformers' caches hold it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from bitmill.errors import UsageError
from bitmill.kv.base import PAGE, Scheme
from bitmill.kv.page import PageLayout
from bitmill.kv.rope import Rope
from bitmill.kv.side import Calibrated, Coder
from bitmill.kv.store import PageStore


class QuantizedLayer(DynamicLayer):
    """Packed pages, and a few tokens in fp16: the first ones of each sequence and those that wait to be packed.

    Slots count appended tokens from 0. `start` (rows,) is the slot of a row's first token that is no padding.
    strict: what is appended is read back from what is stored even in the call that brings it, as in evaluation;
        otherwise a prompt attends to its own numbers and is packed afterwards.
    direct: `update` gives empty tensors that carry this layer when one token a row is appended; only for models
        whose attention takes them from there (bitmill.kv.attention).
    window: how many tokens are in sight, in layers with a sliding window.
    """

    is_compileable = False
    supports_early_init = False

    def __init__(
        self,
        scheme: Scheme,
        calibrated: tuple[Calibrated, Calibrated],
        rope: Rope | None,
        window: int | None = None,
        strict: bool = False,
    ) -> None:
        self.scheme, self.calibrated, self.rope, self.window, self.strict = (
            scheme,
            calibrated,
            rope,
            window,
            strict,
        )
        self.direct = False
        self.record_past = False
        self.reset()

    @property
    def is_sliding(self) -> bool:  # type: ignore[override]
        """Whether tokens go out of sight."""
        return self.window is not None

    def reset(self) -> None:
        """Forget all tokens."""
        self.is_initialized, self.length = False, 0
        self.start: Tensor | None = None
        self.store: PageStore | None = None
        self._memo: tuple[int, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for rows and heads like those of key_states (rows, heads, tokens, dim)."""
        self.dtype, self.device = key_states.dtype, key_states.device
        rows, self.heads, _, self.dim = key_states.shape
        if value_states.shape[-1] != self.dim:
            raise UsageError(
                f"Keys have {self.dim} numbers a head and values {value_states.shape[-1]}; "
                "the packed cache wants as many of both."
            )
        layout = PageLayout(self.scheme, self.heads, self.dim)
        coders = [
            Coder(side, self.heads, self.dim, calibrated)
            for side, calibrated in zip((self.scheme.keys, self.scheme.values), self.calibrated, strict=True)
        ]
        self.store = PageStore(layout, coders[0], coders[1], rows, self.device)
        if self.start is None:
            self.start = torch.zeros(rows, dtype=torch.int64, device=self.device)
        room = (2, rows, self.heads, self.scheme.sink + self.scheme.tail, self.dim)
        with torch.inference_mode(False):
            self.loose = torch.zeros(room, dtype=torch.float16, device=self.device)
        self.is_initialized = True

    @property
    def pages(self) -> PageStore:
        """The packed part."""
        assert self.store is not None
        return self.store

    @property
    def waiting(self) -> int:
        """Tokens in fp16 that are not packed yet."""
        return self.length - self.pages.end

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        """All keys in sight (rows, heads, tokens, dim), decoded."""
        return self.floats()[0]

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """All values in sight, decoded."""
        return self.floats()[1]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (rows, heads, tokens, dim); returns keys and values that the new tokens may look at."""
        new = key_states.shape[-2]
        if self.direct and new == 1 and self.length and not self.strict:
            self.append(key_states, value_states)
            carriers = [states[..., :0, :] for states in (key_states, value_states)]
            carriers[0].packed_layer = self  # type: ignore[attr-defined]
            return carriers[0], carriers[1]
        seen = None if self.strict or not self.length else self.floats(new)
        self.append(key_states, value_states)
        if self.strict:
            return self.floats(new)
        if seen is None:
            return key_states, value_states
        return torch.cat([seen[0], key_states], -2), torch.cat([seen[1], value_states], -2)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Take in tokens, and pack the pages that are full."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        if self.window is not None and not self.record_past:
            self.pages.let_go(self.length - self.window + 1)
        states = self._turned(torch.stack([keys.detach(), values.detach()]).float())
        sink, waiting, new = self.scheme.sink, self.waiting, keys.shape[-2]
        self.length += new
        if waiting + new < self.scheme.tail:
            self.loose[:, :, :, sink + waiting : sink + waiting + new] = _in_half(states)
            return
        states = torch.cat([self.loose[:, :, :, sink : sink + waiting].float(), states], -2)
        packed = (states.shape[-2] - self.scheme.residual) // PAGE * PAGE
        self._keep_sinks(states[..., :packed, :])
        self._pack(states[..., :packed, :])
        rest = states[..., packed:, :]
        self.loose[:, :, :, sink : sink + rest.shape[-2]] = _in_half(rest)

    def _keep_sinks(self, states: Tensor) -> None:
        """Copy what leaves for the pages and is among the first tokens of its row."""
        first = self.pages.end
        for i in range(self.scheme.sink):
            slot = self._start + i - first
            rows = ((slot >= 0) & (slot < states.shape[-2])).nonzero()[:, 0]
            if len(rows):
                self.loose[:, rows, :, i] = _in_half(states[:, rows, :, slot[rows]].transpose(0, 1))

    def _pack(self, states: Tensor) -> None:
        keys, values = states
        if self.scheme.pre_rope and self.rope is not None:
            keys = self.rope.undo(keys, self._positions(self.pages.end, keys.shape[-2]))
        self.pages.append(_flat(keys), _flat(values))

    @property
    def _start(self) -> Tensor:
        assert self.start is not None
        return self.start

    def _positions(self, first: int, count: int) -> Tensor:
        slots = torch.arange(first, first + count, device=self.device)
        return slots[None] - self._start[:, None]

    def _turned(self, states: Tensor, back: bool = False) -> Tensor:
        """Keys and values (2, ...) in the basis that is stored, or back in the model's."""
        turns = [coder.turn for coder in (self.pages.keys, self.pages.values)]
        if turns[0] is None and turns[1] is None:
            return states
        return torch.stack(
            [x if turn is None else x @ (turn if back else turn.mT).to(x.device) for x, turn in zip(states, turns)]
        )

    def in_sight(self, new: int) -> int:
        """The first slot that any of the last `new` tokens may look at."""
        return 0 if self.window is None else max(0, self.length - self.window - new + 1)

    def floats(self, new: int = 0) -> tuple[Tensor, Tensor]:
        """Keys, after RoPE, and values (rows, heads, tokens, dim) of what is in sight of `new` tokens.

        With `new` tokens about to be appended, or just appended in strict mode, as get_mask_sizes counts them.
        """
        last = self.length if self.strict else self.length + new
        first = 0 if self.window is None else max(0, last - new - self.window + 1)
        border = max(first // PAGE * PAGE, self.pages.first)
        packed = self._decoded(border)
        sink, waiting = self.scheme.sink, self.waiting
        loose = self._turned(self.loose[:, :, :, sink : sink + waiting].float(), back=True)
        states = torch.cat([packed, loose], -2)[..., first - border :, :].to(self.dtype)
        return states[0], states[1]

    def attend(self, query: Tensor, scaling: float, first: Tensor) -> Tensor:
        """Attention of one token a row, query (rows, query heads, dim), over slots from `first` (rows,) on."""
        return read_by_floats(self, query, scaling, first)

    def _decoded(self, border: int) -> Tensor:
        """Packed keys, after RoPE, and values (2, rows, heads, tokens, dim) from a page border on, sinks exact."""
        end = self.pages.end
        if self._memo is not None and self._memo[0] == border:
            known = self._memo[1]
            fresh = self._decode_pages(border + known.shape[-2], end)
            states = torch.cat([known, fresh], -2)
        else:
            states = self._decode_pages(border, end)
        if self.strict:  # evaluation reads everything again and again
            self._memo = border, states
        return states

    def _decode_pages(self, first: int, end: int) -> Tensor:
        keys, values = (_heads(x, self.heads) for x in self.pages.read(first, end))
        if self.scheme.pre_rope and self.rope is not None:
            keys = self.rope.apply(keys, self._positions(first, keys.shape[-2]))
        states = self._turned(torch.stack([keys, values]), back=True)
        sinks = self._turned(self.loose[:, :, :, : self.scheme.sink].float(), back=True)
        for i in range(self.scheme.sink):
            slot = self._start + i - first
            rows = ((slot >= 0) & (slot < states.shape[-2])).nonzero()[:, 0]
            states[:, rows, :, slot[rows]] = sinks[:, rows, :, i].transpose(0, 1)
        return states

    def get_seq_length(self) -> int:
        """Tokens that were appended."""
        return self.length

    def get_max_length(self) -> int:
        """-1, or the window."""
        return -1 if self.window is None else self.window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys `query_length` tokens look at, and the slot of the first."""
        first = 0 if self.window is None else max(0, self.length - self.window + 1)
        return self.length + query_length - first, first

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; the rest of a page that is cut waits in fp16 again."""
        if tokens_to_remove > 0:
            raise UsageError(
                f"crop({tokens_to_remove}) keeps a length; give a negative number of tokens to forget."
            )
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        length = max(0, self.length + tokens_to_remove)
        if self.window is not None and length and length - self.window + 1 < self.pages.first:
            raise UsageError(
                f"{-tokens_to_remove} tokens cannot be taken back: what was in sight then is gone; "
                "call activate_past_recording() first."
            )
        if length < self.pages.end:
            border = length // PAGE * PAGE
            states = self._turned(self._decode_pages(border, border + PAGE))[..., : length - border, :]
            self.pages.cut(border)
            self.loose[:, :, :, self.scheme.sink : self.scheme.sink + length - border] = _in_half(states)
        self.length, self._memo = length, None

    def activate_past_recording(self) -> None:
        """Keep what slides out of sight, so that it can be cropped back to."""
        self.record_past = True

    def _of_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.pages.of_rows(change)
            self.loose = torch.stack([change(self.loose[0]), change(self.loose[1])])
            self.pages.rows = self.loose.shape[1]
        if self.start is not None:
            self.start = change(self.start)
        self._memo = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        self._of_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self._of_rows(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        self._of_rows(lambda x: x[indices.to(x.device)])

    @property
    def allocated_bytes(self) -> int:
        """Everything that grows with tokens or rows: pages, and the room for tokens in fp16."""
        return self.pages.bytes + self.loose.numel() * 2 if self.is_initialized else 0

    @property
    def elements(self) -> int:
        """Numbers that an ordinary cache would hold for the tokens in sight."""
        if not self.is_initialized:
            return 0
        seen = self.length if self.window is None else min(self.length, self.window - 1)
        return 2 * self.pages.rows * self.heads * self.dim * seen


def read_by_floats(layer: QuantizedLayer, query: Tensor, scaling: float, first: Tensor) -> Tensor:
    """The slow way, for what no kernel takes: all is decoded, then attended to."""
    keys, values = layer.floats()
    slots = torch.arange(layer.length - keys.shape[-2], layer.length, device=keys.device)
    mask = (slots >= first[:, None])[:, None, None]
    grouped = query.unflatten(1, (layer.heads, -1))
    out = torch.nn.functional.scaled_dot_product_attention(
        grouped.float(), keys.float(), values.float(), attn_mask=mask, scale=scaling
    )
    return out.flatten(1, 2)


def _flat(x: Tensor) -> Tensor:
    """(rows, heads, tokens, dim) to (rows, tokens, channels)."""
    return x.transpose(1, 2).flatten(2)


def _heads(x: Tensor, heads: int) -> Tensor:
    """(rows, tokens, channels) to (rows, heads, tokens, dim)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _in_half(x: Tensor) -> Tensor:
    return x.clamp(-65504, 65504).to(torch.float16)
