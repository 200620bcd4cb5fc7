"""Modules that hold packed tensors: casts of the model leave them alone, for they mean what their bits say."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from bitmill.errors import CheckpointError
from bitmill.formats import Format
from bitmill.formats.base import Layout
from bitmill.runtime import ops
from bitmill.runtime.kernels import Kernel, KernelSpec, choose_kernel
from bitmill.runtime.kernels.reference import TraceKernel

_TURN = threading.RLock()  # held by whoever lays a matrix out anew or asks for its packed tensors


class PackedModule(nn.Module):
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


class PackedMatrix(PackedModule):
    """W^ (rows, columns) in any format.

    Whoever computes with it has a kernel do so, which takes over the tensors and may lay them out anew: then the
    buffers are the kernel's, and only one of the two layouts is held. Whoever asks for the packed tensors after
    that (by name, `packed`, `state_dict`) gets them back, bit by bit, in place of the kernel's.

    shared: the module that holds the parts which the matrix shares with others; a kernel reads them there.
    """

    format: Format
    shape: tuple[int, int]
    outside_blocks = False  # True for a table of embeddings and for the head
    shared: PackedModule | None = None
    _kernel: Kernel | None = None
    _text: str  # `ops.text_of` the format

    def packed(self) -> dict[str, Tensor]:
        """All packed tensors by name, those that it shares too."""
        if self._kernel is None and ops.is_traced():
            return self._as_stored()
        with _TURN:
            self._take_back()
            return self._as_stored()

    def _as_stored(self) -> dict[str, Tensor]:
        return {**super().packed(), **(self.shared.packed() if self.shared else {})}

    def kernel_on(self, device: torch.device) -> Kernel:
        """What multiplies with the matrix there; from now on it holds the tensors.

        A trace that comes before its first use decodes the packed tensors each time: slow, use it once before.
        """
        kernel = self._kernel
        if kernel is not None and kernel.spec.device == device:
            return kernel
        if ops.is_traced():
            return TraceKernel(KernelSpec(self.format, self.shape, device), self.packed(), self._text)
        with _TURN:
            if self._kernel is None or self._kernel.spec.device != device:
                self._kernel = self._lay_out(device)
            return self._kernel

    def _lay_out(self, device: torch.device) -> Kernel:
        spec, tensors = KernelSpec(self.format, self.shape, device), self.packed()
        kernel = choose_kernel(spec)(spec, tensors)
        shared = {id(tensors[name]) for name in tensors if name not in self._held}
        for name in self._held:
            del self._buffers[name]
        self._buffers.update({name: t for name, t in kernel.tensors.items() if id(t) not in shared})
        return kernel

    def _take_back(self) -> None:
        if self._kernel is None:
            return
        kernel, self._kernel = self._kernel, None
        for name in kernel.tensors:
            self._buffers.pop(name, None)
        tensors = kernel.restore()
        self._buffers.update({name: tensors[name] for name in self._held})

    def __getattr__(self, name: str) -> Any:
        """Packed tensors that a kernel has taken are asked back."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in self._held:
                raise
        with _TURN:  # another thread may be laying them out
            return super().__getattr__(name) if self._kernel is None else self.packed()[name]

    def _save_to_state_dict(self, *args: Any) -> None:
        with _TURN:
            self._take_back()
            super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        with _TURN:
            self._take_back()
            super()._load_from_state_dict(*args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        with _TURN:
            self._take_back()
            return super()._apply(fn, recurse)


def detach_files(model: nn.Module) -> None:
    """Copy all that is small of a model whose tensors are mapped files: who holds one tensor holds the file.

    Then a file goes as soon as its codes are laid out anew. Codes and float matrices stay mapped.
    """
    for module in model.modules():
        buffers = {name: tensor for name, tensor in module._buffers.items() if tensor is not None}
        sizes = {name: tensor.nbytes for name, tensor in buffers.items() if isinstance(module, PackedMatrix)}
        codes = max(sizes, key=lambda name: sizes[name], default=None)
        for name, tensor in buffers.items():
            if name != codes and (isinstance(module, PackedModule) or tensor.dim() < 2):
                module._buffers[name] = tensor.clone()
        for parameter in module._parameters.values():
            if parameter is not None and parameter.dim() < 2:
                parameter.data = parameter.data.clone()


def shared_module(model: nn.Module, place: str, format: Format, device: Any = None) -> PackedModule:
    """The module at the path `place` that holds what layers of `format` share, made if it is not there yet.

    Raises CheckpointError when something else is there.
    """
    above, (*path, leaf) = model, place.split(".")
    for name in path:
        if name not in above._modules:
            _put(above, name, nn.Module(), place)
        above = above.get_submodule(name)
    if leaf not in above._modules:
        _put(above, leaf, PackedModule(format.shared_layout(), device), place)
    found = above.get_submodule(leaf)
    if isinstance(found, PackedModule) and set(found.packed()) == format.shared:
        return found
    raise CheckpointError(f"{place!r} of {type(model).__name__} is no place for what layers share.")


def _put(above: nn.Module, name: str, module: nn.Module, place: str) -> None:
    try:
        above.add_module(name, module)
    except KeyError:  # an attribute of that name, or no name at all
        raise CheckpointError(f"{place!r} of {type(above).__name__} is no place for what layers share.") from None
