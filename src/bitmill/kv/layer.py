"""Packed keys and values of one layer, as a layer of a transformers cache."""

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


class QuantizedLayer(DynamicLayer):
    """Cache layer that appends to and reads from a `TokenBuffer`.

    Args:
        scheme: storage scheme.
        params: calibrated parameters of keys and values.
        rope: rotary embedding that is undone before keys are stored.
        window: length of a sliding window, in tokens; None for full attention.
        config: of a model whose attention can read this layer directly (bitmill.kv.attention): `update` then
            returns empty tensors that carry the layer when one token per row is appended.
        cache_decoded: keep decoded pages, for callers that read all tokens again and again and have the memory.
    """

    is_compileable = False
    supports_early_init = False

    def __init__(  # the base's only sets keys and values, which are properties here
        self,
        scheme: Scheme,
        params: tuple[CalibratedParams, CalibratedParams],
        rope: Rope | None,
        window: int | None = None,
        config: Any = None,
        cache_decoded: bool = False,
    ) -> None:
        self.window, self.config, self.cache_decoded = window, config, cache_decoded
        self.record_past = False
        self.buffer = TokenBuffer(scheme, params, rope)
        self._reset_derived()

    def _reset_derived(self) -> None:
        self.is_initialized = False
        self._decoded: tuple[int, Tensor] | None = None
        self._kernel_args: AttentionKernelArgs | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, which builds its own kernel arguments and decodes again."""
        return {**vars(self), "_kernel_args": None, "_decoded": None}

    @property
    def scheme(self) -> Scheme:
        """Return the storage scheme."""
        return self.buffer.scheme

    @property
    def length(self) -> int:
        """Return the tokens that were appended."""
        return self.buffer.length

    @property
    def is_sliding(self) -> bool:  # type: ignore[override]
        """Return True for a layer with a sliding window."""
        return self.window is not None

    @property
    def is_direct(self) -> bool:
        """Return True if the model's attention, as its config is now, reads this layer directly."""
        return self.config is not None and self.config._attn_implementation == ATTENTION

    def reset(self) -> None:
        """Drop all tokens and free their memory."""
        self.buffer.clear()
        self._reset_derived()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate memory for rows and heads like those of key_states (rows, heads, tokens, dim).

        Raises:
            UsageError: keys and values differ in their head dimension.
        """
        rows, heads, _, dim = key_states.shape
        if value_states.shape[-1] != dim:
            raise UsageError(
                f"Keys have {dim} numbers a head and values {value_states.shape[-1]}; "
                "the packed cache needs as many of both."
            )
        self.buffer.allocate(rows, heads, dim, key_states.device)
        self.dtype, self.is_initialized = key_states.dtype, True

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        """Return all visible keys, decoded (rows, heads, tokens, dim)."""
        return self.decode(self.first_visible(0))[0]

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """Return all visible values, decoded."""
        return self.decode(self.first_visible(0))[1]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens.

        Args:
            key_states: (rows, heads, tokens, dim), after RoPE.
            value_states: of that shape.
            args, kwargs: ignored; further arguments of transformers.

        Returns:
            Keys and values that the new tokens attend to; empty ones that carry the layer where the model's
            attention reads it directly.
        """
        if self.length == 0:
            self.append(key_states, value_states)
            return key_states, value_states
        if key_states.shape[-2] == 1 and self.is_direct:
            self.append(key_states, value_states)
            carrier: Any = key_states[..., :0, :]
            carrier.packed_layer = self
            return carrier, value_states[..., :0, :]
        self.buffer.pack_full_page()
        new = key_states.shape[-2]
        keys, values = self.decode(self.first_visible(0), new)
        for states, own in ((keys, key_states), (values, value_states)):
            states.narrow(-2, states.shape[-2] - new, new).copy_(own)
        self.append(key_states, value_states)
        return keys, values

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Append tokens, and free those that left the sliding window.

        Args:
            keys: (rows, heads, tokens, dim), after RoPE.
            values: of that shape.

        Raises:
            UsageError: keys and values differ in their head dimension.
        """
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.buffer.append(keys, values)
        if self.window is not None and not self.record_past:
            self.buffer.evict(self.first_visible(1))

    def restore(self, dtype: torch.dtype, *tokens: Any) -> None:
        """Fill an allocated layer with saved tokens.

        Args:
            dtype: of the model's keys and values.
            tokens: arguments of `TokenBuffer.restore`.
        """
        self.buffer.restore(*tokens)
        self.dtype, self.is_initialized = dtype, True

    def first_visible(self, back: int) -> int:
        """Return the first slot visible to the token `back` before the next one, which is yet to be appended."""
        return 0 if self.window is None else max(0, self.length - back - self.window + 1)

    def decode(self, first: int, room: int = 0) -> tuple[Tensor, Tensor]:
        """Decode the tokens from a slot on.

        Args:
            first: slot.
            room: further slots to allocate after the tokens.

        Returns:
            Keys, after RoPE, and values (rows, heads, tokens + room, dim), of the model's dtype.
        """
        read = self._read_cached if self.cache_decoded else self.buffer.read
        states = read(first, room, self.dtype)
        return states[0], states[1]

    def _read_cached(self, first: int, room: int, dtype: torch.dtype) -> Tensor:
        """Read like `TokenBuffer.read`, and keep the decoded pages for the next call."""
        buffer = self.buffer
        end = buffer.pages.end
        border = min(max(first // PAGE * PAGE, buffer.pages.first), end)  # all visible tokens may be unpacked
        if self._decoded is None or self._decoded[0] > border:
            self._decoded = border, buffer.read_pages(border, border)
        begin, decoded = self._decoded
        fresh = buffer.read_pages(max(border, begin + decoded.shape[-2]), end)
        packed = torch.cat([decoded[..., border - begin :, :], fresh], -2)
        self._decoded = border, packed
        return torch.cat([packed.to(dtype), buffer.read(end, room, dtype)], -2)[..., first - border :, :]

    def get_seq_length(self) -> int:
        """Return the tokens that were appended."""
        return self.length

    def get_max_length(self) -> int:
        """Return the length of the sliding window, -1 without one."""
        return -1 if self.window is None else self.window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys that `query_length` further tokens attend to, and the slot of the first."""
        first = self.first_visible(0)
        return self.length + query_length - first, first

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens; `tokens_to_remove` is negative, as in transformers.

        Raises:
            UsageError: it is positive, or tokens that become visible again were freed with the sliding window.
        """
        if tokens_to_remove > 0:
            raise UsageError(
                f"crop({tokens_to_remove}) gives a length to keep; give a negative number of tokens to remove."
            )
        if not self.is_initialized:
            return
        if -tokens_to_remove >= self.length:
            self.reset()
            return
        if tokens_to_remove and self.first_visible(-tokens_to_remove) < self.buffer.pages.first:
            raise UsageError(
                f"{-tokens_to_remove} tokens cannot be removed: the tokens visible before them were freed; "
                "call activate_past_recording() first."
            )
        self.buffer.truncate(self.length + tokens_to_remove)
        self._decoded = None
        if self.window is not None:
            self.buffer.evict(self.first_visible(0))

    def activate_past_recording(self) -> None:
        """Keep tokens that leave the sliding window until the next `crop`."""
        self.record_past = True

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace the rows: `change` maps a tensor (rows, ...) to its new rows."""
        self.buffer.map_batch(change)
        self._decoded = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace row i by row beam_idx[i]."""
        if self.is_initialized and beam_idx.tolist() != list(range(self.buffer.pages.rows)):
            self.map_batch(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self.map_batch(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows of these indices."""
        self.map_batch(lambda x: x[indices.to(x.device)])

    @property
    def allocated_bytes(self) -> int:
        """Return the bytes that grow with tokens or rows: pages and the fp16 buffer."""
        return self.buffer.allocated_bytes

    @property
    def elements(self) -> int:
        """Return the numbers that an ordinary cache would hold for the visible tokens."""
        if not self.is_initialized:
            return 0
        buffer = self.buffer
        return 2 * buffer.pages.rows * buffer.heads * buffer.dim * (self.length - self.first_visible(0))

    def attend(self, query: Tensor, scaling: float, first: Tensor) -> Tensor:
        """Compute the attention of one token per row.

        Args:
            query: (rows, query heads, dim), after RoPE.
            scaling: multiplier of the scores.
            first: (rows,) int32, first visible slot of each row.

        Returns:
            fp32 (rows, query heads, dim).
        """
        if self.kernel_args.unsupported_reason is None:
            return self.kernel_args.attend(query, scaling, first)
        return attend_decoded(self, query, scaling, first)

    @property
    def kernel_args(self) -> AttentionKernelArgs:
        """Return the arguments of the attention kernel for this layer's tokens."""
        if self._kernel_args is None:
            self._kernel_args = AttentionKernelArgs(self.buffer)
        return self._kernel_args

    @property
    def unsupported_reason(self) -> str | None:
        """Return None if a kernel reads the packed tokens, else a sentence on why they are decoded."""
        if not self.is_direct:
            return "The model's attention needs floats; packed tokens are decoded."
        return (
            AttentionKernelArgs(self.buffer).unsupported_reason if self.is_initialized else "The cache is empty."
        )


def attend_decoded(layer: QuantizedLayer, query: Tensor, scaling: float, first: Tensor) -> Tensor:
    """Compute attention on decoded tokens, where no kernel reads the packed ones.

    Args:
        layer: packed layer.
        query: (rows, query heads, dim), after RoPE.
        scaling: multiplier of the scores.
        first: (rows,), first visible slot of each row.

    Returns:
        fp32 (rows, query heads, dim).
    """
    begin = layer.first_visible(1)
    keys, values = layer.buffer.read(begin)
    slots = torch.arange(begin, layer.length, device=keys.device)
    mask = (slots >= first[:, None])[:, None, None]
    grouped = query.unflatten(1, (layer.buffer.heads, -1))
    out = torch.nn.functional.scaled_dot_product_attention(
        grouped.float(), keys, values, attn_mask=mask, scale=scaling
    )
    return out.flatten(1, 2)
