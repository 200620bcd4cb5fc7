"""A model's logits as they are when everything before a token is read from the packed cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitmill.compat import forward_with_cache
from bitmill.kv.cache import QuantizedCache
from bitmill.kv.calibration_file import KVCalibration
from bitmill.kv.scheme import PAGE, KVMethod


class PackedCacheLogits:
    """Callable from tokens (windows, length) to logits (windows, length, vocabulary), by a fresh packed cache.

    Windows go through a page of tokens at a time. A token sees the pages before its own packed and its own in
    float, which is exactly what it sees when a text is generated token by token.
    bits_per_element, bytes, table_bytes: of the cache of the last windows, when they were through.
    """

    def __init__(self, model: nn.Module, method: KVMethod, calibration: KVCalibration | None) -> None:
        self.model, self.method, self.calibration = model, method, calibration
        self.bits_per_element, self.bytes, self.table_bytes = 0.0, 0, 0

    def __call__(self, tokens: Tensor) -> Tensor:
        """The logits."""
        cache = QuantizedCache(self.model, self.method, calibration=self.calibration, cache_decoded=True)
        pieces: list[Any] = []
        for start in range(0, tokens.shape[1], PAGE):
            output, _ = forward_with_cache(self.model, tokens[:, start : start + PAGE], cache)
            pieces.append(output.logits)
        self.bits_per_element, self.bytes = cache.bits_per_element, cache.allocated_bytes
        self.table_bytes = cache.table_bytes
        return torch.cat(pieces, 1)
