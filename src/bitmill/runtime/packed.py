"""What quantized layers have in common: a matrix that is kept packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from bitmill.formats import Format


class Packed(nn.Module):
    """W^ (rows, columns) in any format. The packed tensors are buffers named as on disk.

    Casting the model (`.to(torch.bfloat16)`) moves them but leaves their types alone: they mean what their bits
    say.
    """

    format: Format
    shape: tuple[int, int]
    outside = False  # of all blocks: a table of embeddings, or the head

    def hold(self, format: Format, shape: tuple[int, int], device: Any = None) -> None:
        """Make room for a matrix."""
        self.format, self.shape = format, shape
        for name, (size, dtype) in format.layout(shape).items():
            self.register_buffer(name, torch.empty(size, dtype=dtype, device=device))

    def packed(self) -> dict[str, Tensor]:
        """The packed tensors by name."""
        return {name: getattr(self, name) for name in self.format.layout(self.shape)}

    def _own(self) -> dict[str, Tensor]:
        """Those that are kept here."""
        return self.packed()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = self._own()
        for name in kept:
            self._buffers[name] = None
        try:
            super()._apply(fn, recurse)
        except Exception:
            self._buffers.update(kept)
            raise
        for name, tensor in kept.items():
            probe = fn(torch.empty(0, device=tensor.device))
            # to_empty() maps a meta tensor to fresh memory; every other fn only tells us the device
            moved = torch.empty_like(tensor, device=probe.device) if tensor.is_meta else tensor.to(probe.device)
            self._buffers[name] = moved
        return self
