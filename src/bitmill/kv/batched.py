"""The full pages of all layers of a cache, packed at once: a layer at a time, calls of torch take longest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitmill.kv.buffer import TokenBuffer
from bitmill.kv.codec import TensorCodec
from bitmill.kv.scheme import PAGE


class BatchedCodec(TensorCodec):
    """The coders of one side of several layers as one, whose rows are the layers."""

    def __init__(self, coders: Sequence[TensorCodec]) -> None:
        vars(self).update(vars(coders[0]))
        self._coders = coders

        def map_batch(numbers: list[Tensor | None]) -> Tensor | None:
            there = [x for x in numbers if x is not None]
            return torch.stack(there)[:, None, None] if there else None

        self.scale, self.zero = map_batch([c.scale for c in coders]), map_batch([c.zero for c in coders])
        self._weight = map_batch([c._weight for c in coders])
        self.levels = torch.stack([c.levels for c in coders])
        if self.side.axis == "channel":
            all_edges = torch.stack([c.channel_edges for c in coders])[:, None, None]
            self._between = [edges.contiguous() for edges in all_edges.unbind(-1)]
        elif self.side.levels == "learned":
            tables = [c._table.edges_in_order() for c in coders if c._table is not None]
            found = [edges for edges in tables if edges is not None]
            self._is_even = len({len(edges) for edges in found}) == 1 and len(found) == len(coders)
            if self._is_even:
                self._between = [edges.view(-1, 1, 1, 1) for edges in torch.stack(found).unbind(-1)]

    def _codes(self, normal: Tensor) -> Tensor:
        if self.side.axis != "channel" and self.side.levels != "learned":
            return super()._codes(normal)
        if self.side.axis != "channel" and not self._is_even:
            return torch.cat([c._codes(one[None]) for c, one in zip(self._coders, normal)])
        codes = torch.zeros(normal.shape, dtype=torch.uint8, device=normal.device)
        for edges in self._between:
            codes += (normal > edges).view(torch.uint8)
        return codes

    def _at(self, codes: Tensor) -> Tensor:
        rows = torch.arange(len(self._coders), dtype=torch.int32, device=codes.device).view(-1, 1, 1, 1)
        if self.side.axis == "channel":
            rows = rows * self.channels + torch.arange(self.channels, dtype=torch.int32, device=codes.device)
        index = codes.int() + rows * self.levels.shape[-1]
        return self.levels.flatten().index_select(0, index.flatten()).view(codes.shape)


class BatchPacker:
    """Layers of one row each, alike in shape, scheme and length, that are packed together."""

    def __init__(self, layers: Sequence[TokenBuffer]) -> None:
        self.layers, first = layers, layers[0]
        self._ropes = [layer.rope for layer in layers] if first.scheme.pre_rope else []
        stores = [layer.pages for layer in layers]
        self._coders = [
            BatchedCodec([store.keys for store in stores]),
            BatchedCodec([store.values for store in stores]),
        ]

    @property
    def is_possible(self) -> bool:
        """Whether the next page of every layer is made alike: turned by the same angles, without first tokens."""
        first = self.layers[0]
        ropes = self._ropes
        return first.pages.end >= first.scheme.sink and all(
            (a is None) == (ropes[0] is None)
            and (a is None or b is None or (a.factor == b.factor and torch.equal(a.frequencies, b.frequencies)))
            for a, b in zip(ropes, ropes[:1] * len(ropes))
        )

    def pack_full_page(self) -> None:
        """Pack the page that is full in every layer, as `TokenBuffer.pack_full_page` does."""
        first = self.layers[0]
        begin = first.scheme.sink
        full = [layer.fp16_buffer[:, 0, :, begin : begin + PAGE] for layer in self.layers]
        keys, values = torch.stack(full, 1).float()
        if self._ropes and self._ropes[0] is not None:
            slots = torch.arange(first.pages.end, first.pages.end + PAGE, device=first.device)
            keys = self._ropes[0].undo(keys, slots[None])
        layout = first.pages.layout
        pages = torch.zeros(len(self.layers), 1, layout.words, dtype=torch.int32, device=first.device)
        coded = [coder.encode(x.transpose(1, 2).flatten(2)) for coder, x in zip(self._coders, (keys, values))]
        layout.write(pages, *coded)
        for layer, page in zip(self.layers, pages):
            layer.pages.take(page)
            if layer.scheme.residual:
                num_unpacked = layer.fp16_buffer[:, :, :, begin + PAGE :].clone()
                layer.fp16_buffer[:, :, :, begin : begin + layer.scheme.residual] = num_unpacked
