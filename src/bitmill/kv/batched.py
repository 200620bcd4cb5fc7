"""Packing of the full pages of all layers at once: one layer at a time, the overhead of torch calls dominates."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bitmill.kv.buffer import TokenBuffer
from bitmill.kv.codec import TensorCodec
from bitmill.kv.scheme import PAGE


class BatchPacker:
    """Packs the next page of several layers, as `TokenBuffer.pack_full_page` does of one.

    Args:
        buffers: of layers with one row each and equal shape, scheme and length.
    """

    def __init__(self, buffers: Sequence[TokenBuffer]) -> None:
        self.buffers, first = buffers, buffers[0]
        self._ropes = [buffer.rope for buffer in buffers] if first.scheme.pre_rope else []
        stores = [buffer.pages for buffer in buffers]
        self._keys = TensorCodec.stack([store.keys for store in stores])
        self._values = TensorCodec.stack([store.values for store in stores])

    @property
    def can_pack(self) -> bool:
        """Return True if the next pages hold no attention sinks and are packed by equal steps in every layer."""
        first = self.buffers[0]
        return (
            first.pages.end >= first.scheme.sink
            and self._keys is not None
            and self._values is not None
            and self._have_equal_ropes()
        )

    def _have_equal_ropes(self) -> bool:
        for rope in self._ropes[1:]:
            first = self._ropes[0]
            if rope is None or first is None:
                if rope is not first:
                    return False
            elif rope.factor != first.factor or not torch.equal(rope.frequencies, first.frequencies):
                return False
        return True

    def pack_full_pages(self) -> None:
        """Pack the page that is full in every layer; only where `can_pack`."""
        assert self._keys is not None
        assert self._values is not None
        first = self.buffers[0]
        # rows become layers: (2, layers, heads, 32, dim)
        keys, values = torch.stack([buffer.full_page()[:, 0] for buffer in self.buffers], 1).float()
        if self._ropes and self._ropes[0] is not None:
            slots = torch.arange(first.pages.end, first.pages.end + PAGE, device=first.device)
            keys = self._ropes[0].undo(keys, slots[None])
        layout = first.pages.layout
        pages = torch.zeros(len(self.buffers), 1, layout.words, dtype=torch.int32, device=first.device)
        encoded_keys = self._keys.encode(keys.transpose(1, 2).flatten(2))
        encoded_values = self._values.encode(values.transpose(1, 2).flatten(2))
        layout.write(pages, encoded_keys, encoded_values)
        for buffer, page in zip(self.buffers, pages):
            buffer.replace_full_page(page)
