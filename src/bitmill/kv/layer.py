"""One layer's packed keys and values, as transformers' caches hold it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from bitmill.errors import UsageError
from bitmill.kv.buffer import TokenBuffer
from bitmill.kv.codec import CalibratedParams
from bitmill.kv.kernel_args import AttentionKernelArgs
from bitmill.kv.rope import Rope
from bitmill.kv.scheme import ATTENTION, PAGE, Scheme


class QuantizedLayer(TokenBuffer, DynamicLayer):
    """Tokens of a layer, appended and read by transformers' models.

    window: how many tokens are in sight, in layers with a sliding window.
    config: of a model whose attention can read this layer itself (bitmill.kv.attention): when one token a row is
        appended, `update` gives empty tensors that carry the layer.
    remembers: decoded pages are kept, for who reads everything again and again and has the memory.
    """

    is_compileable = False
    supports_early_init = False

    def __init__(
        self,
        scheme: Scheme,
        calibrated: tuple[CalibratedParams, CalibratedParams],
        rope: Rope | None,
        window: int | None = None,
        config: Any = None,
        cache_decoded: bool = False,
    ) -> None:
        self.window, self.config, self.cache_decoded = window, config, cache_decoded
        self.record_past = False
        super().__init__(scheme, calibrated, rope)

    @property
    def is_sliding(self) -> bool:  # type: ignore[override]
        """Whether tokens go out of sight."""
        return self.window is not None

    @property
    def is_direct(self) -> bool:
        """Whether the model's attention reads this layer, as its config is now."""
        return self.config is not None and self.config._attn_implementation == ATTENTION

    def clear(self) -> None:
        """Forget all tokens, and free their memory."""
        super().clear()
        self.is_initialized = False
        self._memo: tuple[int, Tensor] | None = None
        self._reader: AttentionKernelArgs | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies make their own reader and read again."""
        return {**vars(self), "_reader": None, "_memo": None}

    def reset(self) -> None:
        """The same, as transformers calls it."""
        self.clear()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for rows and heads like those of key_states (rows, heads, tokens, dim). Raises UsageError."""
        rows, heads, _, dim = key_states.shape
        if value_states.shape[-1] != dim:
            raise UsageError(
                f"Keys have {dim} numbers a head and values {value_states.shape[-1]}; "
                "the packed cache wants as many of both."
            )
        self.open(rows, heads, dim, key_states.device)
        self.dtype, self.is_initialized = key_states.dtype, True

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        """All keys in sight (rows, heads, tokens, dim), decoded."""
        return self.floats(self.first_for(0))[0]

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """All values in sight, decoded."""
        return self.floats(self.first_for(0))[1]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (rows, heads, tokens, dim); returns keys and values that the new tokens may look at."""
        if self.length == 0:
            self.append(key_states, value_states)
            return key_states, value_states
        if key_states.shape[-2] == 1 and self.is_direct:
            self.append(key_states, value_states)
            carrier: Any = key_states[..., :0, :]
            carrier.packed_layer = self
            return carrier, value_states[..., :0, :]
        self.pack_full_page()
        new = key_states.shape[-2]
        keys, values = self.floats(self.first_for(0), new)
        for states, own in ((keys, key_states), (values, value_states)):
            states.narrow(-2, states.shape[-2] - new, new).copy_(own)
        self.append(key_states, value_states)
        return keys, values

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Take in tokens; what slid out of the last one's sight is freed."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.add(keys, values)
        if self.window is not None and not self.record_past:
            self.evict(self.first_for(1))

    def first_for(self, back: int) -> int:
        """The first slot in sight of the token `back` before the next one, which is not there yet."""
        return 0 if self.window is None else max(0, self.length - back - self.window + 1)

    def floats(self, first: int, room: int = 0) -> tuple[Tensor, Tensor]:
        """Keys, after RoPE, and values (rows, heads, tokens + room, dim) from slot `first` on."""
        read = self._remembered if self.cache_decoded else self.read
        states = read(first, room, self.dtype)
        return states[0], states[1]

    def _remembered(self, first: int, room: int, dtype: torch.dtype) -> Tensor:
        """`read`, for who reads everything again and again: pages are decoded once."""
        end = self.pages.end
        border = min(max(first // PAGE * PAGE, self.pages.first), end)  # all in sight may wait in fp16
        if self._memo is None or self._memo[0] > border:
            self._memo = border, self.read_pages(border, border)
        begin, known = self._memo
        fresh = self.read_pages(max(border, begin + known.shape[-2]), end)
        packed = torch.cat([known[..., border - begin :, :], fresh], -2)
        self._memo = border, packed
        return torch.cat([packed.to(dtype), self.read(end, room, dtype)], -2)[..., first - border :, :]

    def get_seq_length(self) -> int:
        """Tokens that were appended."""
        return self.length

    def get_max_length(self) -> int:
        """-1, or the window."""
        return -1 if self.window is None else self.window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys `query_length` tokens look at, and the slot of the first."""
        first = self.first_for(0)
        return self.length + query_length - first, first

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, as many as the negative number says. Raises UsageError."""
        if tokens_to_remove > 0:
            raise UsageError(
                f"crop({tokens_to_remove}) keeps a length; give a negative number of tokens to forget."
            )
        if not self.is_initialized:
            return
        if -tokens_to_remove >= self.length:
            self.clear()
            return
        if tokens_to_remove and self.first_for(-tokens_to_remove) < self.pages.first:
            raise UsageError(
                f"{-tokens_to_remove} tokens cannot be taken back: what was in sight then is gone; "
                "call activate_past_recording() first."
            )
        self.truncate(self.length + tokens_to_remove)
        self._memo = None
        if self.window is not None:
            self.evict(self.first_for(0))

    def activate_past_recording(self) -> None:
        """Keep what slides out of sight until the next `crop`."""
        self.record_past = True

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put other rows in the place of those there are."""
        super().map_batch(change)
        self._memo = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        if self.is_initialized and beam_idx.tolist() != list(range(self.pages.rows)):
            self.map_batch(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self.map_batch(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        self.map_batch(lambda x: x[indices.to(x.device)])

    @property
    def allocated_bytes(self) -> int:
        """Everything that grows with tokens or rows: pages, and the room for tokens in fp16."""
        return self.bytes

    @property
    def elements(self) -> int:
        """Numbers that an ordinary cache would hold for the tokens in sight."""
        if not self.is_initialized:
            return 0
        return 2 * self.pages.rows * self.heads * self.dim * (self.length - self.first_for(0))

    def attend(self, query: Tensor, scaling: float, first: Tensor) -> Tensor:
        """Attention of one token a row, query (rows, query heads, dim), over slots from `first` (rows,) on."""
        if self.reader.unsupported_reason is None:
            return self.reader.attend(query, scaling, first)
        return read_by_floats(self, query, scaling, first)

    @property
    def reader(self) -> AttentionKernelArgs:
        """What calls kernels on the tokens."""
        if self._reader is None:
            self._reader = AttentionKernelArgs(self)
        return self._reader

    @property
    def unsupported_reason(self) -> str | None:
        """None where a kernel attends to packed tokens as they lie, or one sentence on why they are decoded."""
        if not self.is_direct:
            return "The model's attention wants floats; packed tokens are decoded."
        return AttentionKernelArgs(self).unsupported_reason if self.is_initialized else "Nothing is packed yet."


def read_by_floats(layer: QuantizedLayer, query: Tensor, scaling: float, first: Tensor) -> Tensor:
    """The slow way, for what no kernel takes: all is decoded, then attended to. fp32 (rows, query heads, dim)."""
    begin = layer.first_for(1)
    keys, values = layer.read(begin)
    slots = torch.arange(begin, layer.length, device=keys.device)
    mask = (slots >= first[:, None])[:, None, None]
    grouped = query.unflatten(1, (layer.heads, -1))
    out = torch.nn.functional.scaled_dot_product_attention(
        grouped.float(), keys, values, attn_mask=mask, scale=scaling
    )
    return out.flatten(1, 2)
