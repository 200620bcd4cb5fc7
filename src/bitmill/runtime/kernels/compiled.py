"""Base of the compiled kernels: few tokens go to the extension, the others to torch.

Up to MOST_TOKENS tokens at a time are a product with packed weights. More of them, or inputs that need gradients,
decode tiles of rows and multiply in floats, bit by bit as the reference kernel does.
"""

from __future__ import annotations

import os
import threading
from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from bitmill.formats import GroupFormat
from bitmill.formats.base import Params
from bitmill.runtime import ops
from bitmill.runtime.kernels.base import Kernel, KernelSpec
from bitmill.runtime.kernels.reference import by_tiles, decoded
from bitmill.runtime.native import is_available, native, threads

MOST_TOKENS = 16
_memory = threading.local()


def is_few(x: Tensor) -> bool:
    """Whether x (..., in) is for the extension: few tokens on the CPU, without gradients."""
    tokens = x.numel() // x.shape[-1]
    return (
        0 < tokens <= MOST_TOKENS and x.device.type == "cpu" and not (torch.is_grad_enabled() and x.requires_grad)
    )


def lacking(spec: KernelSpec) -> str | None:
    """Why no compiled kernel can serve a layer, whatever its format; None where one can."""
    if spec.device.type != "cpu":
        return f"it runs on cpu, not on {spec.device.type}."
    return None if is_available() else "the compiled kernels are not installed."


def may_compile(spec: KernelSpec) -> bool:
    """Whether a wrapper may run compiled code around its inner kernel: not where the reference is asked for."""
    return os.environ.get("BITMILL_KERNEL") != "reference" and lacking(spec) is None


def tile_memory(rows: slice, columns: int) -> Tensor:
    """Room for a decoded tile, (rows, columns) fp32, which the thread's next tile overwrites.

    Fresh memory has to be cleared by the system first, which takes longer than decoding.
    """
    size = (rows.stop - rows.start) * columns
    held = getattr(_memory, "tile", None)
    if held is None or held.numel() < size:
        held = _memory.tile = torch.empty(size)
    return held[:size].view(-1, columns)


class Compiled(Kernel):
    """A kernel of the extension."""

    priority = 10

    def apply(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        if not is_few(x):
            return by_tiles(self.spec, self._tile if ops.watched(x) else self.decoder(), x)
        y = self.few(x.reshape(-1, self.spec.shape[1]).to(torch.float32))
        return y.to(x.dtype).view(*x.shape[:-1], self.spec.shape[0])

    @abstractmethod
    def few(self, x: Tensor) -> Tensor:
        """x (tokens, in) to (tokens, out), fp32, by the extension."""

    @abstractmethod
    def decoder(self) -> Callable[[slice], Tensor]:
        """Some rows of W^ as a function, fp32, as `format.dequantize` gives them, until the next call."""

    def weights(self, rows: slice) -> Tensor:
        """Some rows of W^."""
        return self.decoder()(rows).clone()

    def _tile(self, rows: slice) -> Tensor:
        """The same for traces."""
        return self.rows(torch.arange(rows.start, rows.stop))


class Relaid(Compiled):
    """A kernel that holds the codes in the layout of csrc/lut/layout.h, and the packed parameters for decoding."""

    def __init__(self, spec: KernelSpec, tensors: dict[str, Tensor], layout: list[int]) -> None:
        """layout: the arguments of `Layout` in csrc/bind.cpp."""
        self.spec, self.layout, self._text = spec, layout, ops.text_of(spec.format)
        self._words = tensors["codes"].shape[1]
        self.packed = {name: tensor for name, tensor in tensors.items() if name != "codes"}
        made = native().Layout(*layout)
        self.codes = torch.zeros(made.code_bytes, dtype=torch.uint8)
        native().to_layout(made, tensors["codes"].contiguous(), self.codes, threads())

    def held(self, prefix: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """All tensors, with names that no packed tensor has."""
        packed = {f"packed_{name}": tensor for name, tensor in self.packed.items()}
        every = {"codes": self.codes, **parts, **packed}
        return {f"{prefix}_{name}": tensor for name, tensor in every.items()}

    def restore(self) -> dict[str, Tensor]:
        """The packed tensors, bit by bit."""
        words = torch.empty(self.spec.shape[0], self._words, dtype=torch.int32)
        native().from_layout(native().Layout(*self.layout), self.codes, words, threads())
        return {"codes": words, **self.packed}

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of W^, int64 (n,): fp32 (n, in)."""
        format = self.spec.format
        assert isinstance(format, GroupFormat)
        if ops.watched(ids):
            packed = [self.packed[name] for name in format.layout(self.spec.shape) if name != "codes"]
            return ops.relaid_rows(ids, self.codes, packed, self.layout, self._text, list(self.spec.shape))
        codes = torch.empty(len(ids), self.layout[1], dtype=torch.uint8)
        native().codes_at(native().Layout(*self.layout), self.codes, ids.contiguous(), codes, threads())
        return format.rows_of(codes, self.packed, self.spec.shape, ids)

    def decoder(self) -> Callable[[slice], Tensor]:
        """By the format."""
        return decoded(self.spec, self._params(), self._rows)

    def _params(self) -> Params:
        return self.spec.format.unpack_params(self.packed, self.spec.shape)

    def _rows(self, rows: slice) -> Tensor:
        out = torch.empty(rows.stop - rows.start, self.layout[1], dtype=torch.uint8)
        native().codes_of(native().Layout(*self.layout), self.codes, rows.start, out, threads())
        return out
