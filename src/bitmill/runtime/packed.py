"""Modules that hold packed tensors: casts of the model leave them alone, for they mean what their bits say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from bitmill.errors import CheckpointError
from bitmill.formats import Format
from bitmill.formats.base import Layout


class Packed(nn.Module):
    """Buffers named as on disk, of the shapes and types of `layout`."""

    _held: tuple[str, ...] = ()

    def __init__(self, layout: Layout, device: Any = None) -> None:
        super().__init__()
        self.hold(layout, device)

    def hold(self, layout: Layout, device: Any = None) -> None:
        """Make room for the tensors of `layout`."""
        self._held = tuple(layout)
        for name, (size, dtype) in layout.items():
            self.register_buffer(name, torch.empty(size, dtype=dtype, device=device))

    def packed(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {name: getattr(self, name) for name in self._held}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {name: self._buffers[name] for name in self._held}
        for name in kept:
            self._buffers[name] = None
        try:
            super()._apply(fn, recurse)
        except Exception:
            self._buffers.update(kept)
            raise
        for name, tensor in kept.items():
            assert tensor is not None
            probe = fn(torch.empty(0, device=tensor.device))
            # to_empty() maps a meta tensor to fresh memory; every other fn only tells us the device
            moved = torch.empty_like(tensor, device=probe.device) if tensor.is_meta else tensor.to(probe.device)
            self._buffers[name] = moved
        return self


class PackedMatrix(Packed):
    """W^ (rows, columns) in any format."""

    format: Format
    shape: tuple[int, int]
    outside = False  # of all blocks: a table of embeddings, or the head


def shared_module(model: nn.Module, place: str, format: Format, device: Any = None) -> Packed:
    """The module at the path `place` that holds what layers of `format` share, made if it is not there yet.

    Raises CheckpointError when something else is there.
    """
    above, (*path, leaf) = model, place.split(".")
    for name in path:
        if name not in above._modules:
            _put(above, name, nn.Module(), place)
        above = above.get_submodule(name)
    if leaf not in above._modules:
        _put(above, leaf, Packed(format.shared_layout(), device), place)
    found = above.get_submodule(leaf)
    if isinstance(found, Packed) and set(found.packed()) == format.shared:
        return found
    raise CheckpointError(f"{place!r} of {type(model).__name__} is no place for what layers share.")


def _put(above: nn.Module, name: str, module: nn.Module, place: str) -> None:
    try:
        above.add_module(name, module)
    except KeyError:  # an attribute of that name, or no name at all
        raise CheckpointError(f"{place!r} of {type(above).__name__} is no place for what layers share.") from None
