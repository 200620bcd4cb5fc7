"""Modules that hold packed tensors. Casts of the model do not change them: their bits are codes, not numbers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from bitmill.compat import is_traced
from bitmill.errors import CheckpointError
from bitmill.formats import Format
from bitmill.formats.base import Layout
from bitmill.runtime.kernels import Kernel, KernelSpec, choose_kernel
from bitmill.runtime.kernels.reference import TraceKernel

_PREPARING = threading.Lock()  # held while a matrix is repacked for its kernel, so that it happens once


class PackedModule(nn.Module):
    """Buffers named as on disk, with the shapes and types of `layout`."""

    _packed_names: tuple[str, ...] = ()

    def __init__(self, layout: Layout, device: Any = None) -> None:
        """Allocate the tensors of `layout` on `device`."""
        super().__init__()
        self.allocate(layout, device)

    def allocate(self, layout: Layout, device: Any = None) -> None:
        """Register uninitialized buffers.

        Args:
            layout: Sizes and types by name.
            device: Device of the buffers.
        """
        self._packed_names = tuple(layout)
        for name, (size, dtype) in layout.items():
            self.register_buffer(name, torch.empty(size, dtype=dtype, device=device))

    def packed(self) -> dict[str, Tensor]:
        """Return the packed tensors by name."""
        return {name: getattr(self, name) for name in self._packed_names}

    def set_packed(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace packed tensors by others of the layout, without a copy."""
        self._buffers.update(tensors)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {name: self._buffers[name] for name in self._packed_names}
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
            # to_empty() maps a meta tensor to fresh memory; every other fn determines only the device
            moved = torch.empty_like(tensor, device=probe.device) if tensor.is_meta else tensor.to(probe.device)
            self._buffers[name] = moved
        return self


class PackedMatrix(PackedModule):
    """W^ (rows, columns) in any format.

    The first product prepares a kernel, which takes over the packed tensors and may repack them. From then on the
    buffers are the kernel's, so that one layout is held and not two. `packed` and `state_dict` then restore the
    packed tensors bit by bit, in fresh memory. Moving the module and loading a state release the kernel.

    Attributes:
        format: Format of the matrix.
        shape: (rows, columns).
        outside_blocks: True for a table of embeddings and for the head.
        shared: The module with the parts that the matrix shares with others; a kernel reads them there.
        kernel: The kernel that holds the tensors; None before the first product.
    """

    format: Format
    shape: tuple[int, int]
    outside_blocks = False
    shared: PackedModule | None = None
    kernel: Kernel | None = None
    _format_json: str  # `ops.format_to_json` of the format

    def packed(self) -> dict[str, Tensor]:
        """Return all packed tensors by name, shared ones included."""
        # Buffers are read before the kernel: preparing one removes them only after it has set the kernel.
        buffers = dict(self._buffers)
        kernel = self.kernel
        tensors: Mapping[str, Any] = buffers if kernel is None else kernel.restore()
        own = {name: tensors[name] for name in self._packed_names}
        return own if self.shared is None else {**own, **self.shared.packed()}

    def kernel_on(self, device: torch.device) -> Kernel:
        """Return the kernel of the matrix on `device`, preparing it before the first product.

        A trace of a matrix without a kernel decodes the packed tensors in every call, which is slow: run the model
        once before tracing it.
        """
        kernel = self.kernel
        if kernel is not None and kernel.spec.device == device:
            return kernel
        if is_traced():
            return TraceKernel(KernelSpec(self.format, self.shape, device), self.packed(), self._format_json)
        with _PREPARING:
            if self.kernel is None or self.kernel.spec.device != device:
                self._prepare_kernel(device)
            assert self.kernel is not None
            return self.kernel

    def _prepare_kernel(self, device: torch.device) -> None:
        spec, tensors = KernelSpec(self.format, self.shape, device), self.packed()
        kernel = choose_kernel(spec)(spec, tensors)
        shared = {id(tensor) for name, tensor in tensors.items() if name not in self._packed_names}
        replaced = (*self._packed_names, *(self.kernel.tensors if self.kernel else ()))
        self.kernel = kernel
        for name in replaced:
            self._buffers.pop(name, None)
        self._buffers.update({name: t for name, t in kernel.tensors.items() if id(t) not in shared})

    def release_kernel(self) -> None:
        """Restore the packed tensors as buffers and drop the kernel."""
        kernel = self.kernel
        if kernel is None:
            return
        tensors = kernel.restore()
        for name in kernel.tensors:
            self._buffers.pop(name, None)
        self._buffers.update({name: tensors[name] for name in self._packed_names})
        self.kernel = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state with packed tensors; those of a kernel may share memory, which torch.save refuses."""
        state, kernel = dict(vars(self)), self.kernel
        if kernel is not None:
            tensors = kernel.restore()
            kept = {name: tensor for name, tensor in self._buffers.items() if name not in kernel.tensors}
            state["_buffers"] = {**kept, **{name: tensors[name] for name in self._packed_names}}
            state["kernel"] = None
        return state

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        found, kernel = dict(self._buffers), self.kernel  # in this order, as in `packed`
        skipped = {*self._non_persistent_buffers_set, *(kernel.tensors if kernel else ())}
        buffers = {name: tensor for name, tensor in found.items() if name not in skipped}
        packed = self.packed() if self._packed_names else {}  # a tied head has none of its own
        tensors = {**self._parameters, **buffers, **{name: packed[name] for name in self._packed_names}}
        for name, tensor in tensors.items():
            if tensor is not None:
                destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def damage_reason(self) -> str | None:
        """Return what no encoder stores in the packed tensors, as part of a sentence, or None."""
        tensors = self.packed() if self._packed_names else {}  # a tied head has none of its own
        if not tensors or any(tensor.is_meta for tensor in tensors.values()):
            return None
        return self.format.damage_reason(tensors, self.shape)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.release_kernel()
        super()._load_from_state_dict(state_dict, prefix, *args)
        errors: list[str] = args[-1]
        if not errors and all(prefix + name in state_dict for name in self._packed_names):
            reason = None if self.shared is not None else self.damage_reason()  # shared parts may come later
            errors += [f"the layer {prefix.rstrip('.')!r} is damaged: {reason}."] if reason else []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.release_kernel()
        return super()._apply(fn, recurse)


def check_packed(model: nn.Module, place: str) -> None:
    """Check that the packed tensors of a model hold nothing that no encoder stores.

    Args:
        model: The model.
        place: Where they are from, for the error.

    Raises:
        CheckpointError: A layer is damaged.
    """
    for name, module in model.named_modules():
        if isinstance(module, PackedMatrix) and (reason := module.damage_reason()):
            raise CheckpointError(f"The layer {name!r} of {place} is damaged: {reason}; quantize again.")


def detach_files(model: nn.Module) -> None:
    """Copy the small tensors of a model whose tensors are mapped files; codes and float matrices stay mapped.

    A tensor keeps its whole file mapped: without the small ones, a file is released once its codes are repacked.
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
    """Return the module with the parts that layers share, creating it if needed.

    Args:
        model: The model.
        place: Path of the module in the model.
        format: Format of the layers.
        device: Device of a new module.

    Raises:
        CheckpointError: if there is another kind of module or attribute at that path.
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
    raise CheckpointError(f"{place!r} of {type(model).__name__} cannot hold the parts that layers share.")


def _put(above: nn.Module, name: str, module: nn.Module, place: str) -> None:
    try:
        above.add_module(name, module)
    except KeyError:  # an attribute of that name, or no name at all
        raise CheckpointError(
            f"{place!r} of {type(above).__name__} cannot hold the parts that layers share."
        ) from None
