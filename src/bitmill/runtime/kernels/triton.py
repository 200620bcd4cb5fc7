"""Triton kernels for GPUs, chosen by the format.

    binary_coding   runtime/triton/binary.py
    additive        runtime/triton/additive.py
    other scalars   runtime/triton/lut.py

Many tokens, and inputs that need gradients, multiply decoded tiles of rows with torch, as the reference kernel
does.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from bitmill.formats import GroupFormat, ScalarFormat
from bitmill.formats.additive import Additive
from bitmill.formats.base import Params
from bitmill.formats.binary_coding import BinaryCoding
from bitmill.runtime.kernels.base import KERNELS, Kernel, KernelSpec
from bitmill.runtime.kernels.reference import matmul_by_tiles, row_decoder
from bitmill.runtime.triton import available
from bitmill.runtime.triton.available import MAX_TOKENS
from bitmill.runtime.triton.lanes import codes_of_lanes, codes_of_planes, from_words, to_lanes, to_planes

_TYPES = (torch.float32, torch.float16, torch.bfloat16)


@KERNELS.register("triton")
class Triton(Kernel):
    """A kernel for each family of formats; `_family` is the layer's."""

    priority = 5
    tolerance = 1e-5

    @staticmethod
    def unsupported_reason(spec: KernelSpec) -> str | None:
        """Return None for scalar formats of up to 8 bits and additive ones on GPUs with Triton, or the reason."""
        if isinstance(spec.format, ScalarFormat):
            if spec.format.bits > 8:
                return f"{spec.format.name} has {spec.format.bits} bits, more than 8."
        elif not isinstance(spec.format, Additive):
            return f"there is no Triton kernel for {spec.format.name}."
        return available.unsupported_reason(spec.device)

    def __init__(self, spec: KernelSpec, tensors: dict[str, Tensor]) -> None:
        families: dict[type, type[_Family]] = {BinaryCoding: _Binary, Additive: _Additive}
        self.spec = spec
        self._family = families.get(type(spec.format), _Lut)(spec, tensors)

    @property
    def tensors(self) -> dict[str, Tensor]:  # type: ignore[override]
        """The tensors that the family's kernel reads, and those needed to restore the packed ones."""
        return self._family.tensors

    def restore(self) -> dict[str, Tensor]:
        """Return the packed tensors, bit by bit."""
        return self._family.restore()

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows of W^, int64 (n,): fp32 (n, in)."""
        assert isinstance(self.spec.format, GroupFormat)
        return self.spec.format.rows_of(self._family.codes(ids), self._family.packed, self.spec.shape, ids)

    def codes_and_params(self) -> tuple[Tensor, Params]:
        """Return all codes (out, in) and the format's parameters."""
        return self._family.codes(slice(0, self.spec.shape[0])), self._family.params()

    def apply(self, x: Tensor) -> Tensor:
        """Multiply x (..., in) to (..., out)."""
        rows, columns = self.spec.shape
        tokens = x.numel() // columns
        needs_grad = torch.is_grad_enabled() and x.requires_grad
        if not 0 < tokens <= MAX_TOKENS or needs_grad or x.dtype not in _TYPES:
            weights = row_decoder(self.spec, self._family.params(), self._family.codes)
            return matmul_by_tiles(self.spec, weights, x)
        y = self._family.apply(x.reshape(tokens, columns))
        return y.view(*x.shape[:-1], rows)


class _Family(Kernel):
    """The packed parameters, and codes that may be repacked."""

    def __init__(self, spec: KernelSpec, tensors: dict[str, Tensor]) -> None:
        self.spec = spec
        self.packed = {name: tensor for name, tensor in tensors.items() if name != "codes"}

    @staticmethod
    def unsupported_reason(spec: KernelSpec) -> str | None:
        """Return the reason of `Triton`."""
        return Triton.unsupported_reason(spec)

    def params(self) -> Params:
        """Return the format's parameters."""
        return self.spec.format.unpack_params(self.packed, self.spec.shape)

    @property
    def width(self) -> int:
        """The columns of a group."""
        format = self.spec.format
        assert isinstance(format, GroupFormat)
        return min(format.width(self.spec.shape), -(-self.spec.shape[1] // format.block) * format.block)

    @abstractmethod
    def codes(self, rows: slice | Tensor) -> Tensor:
        """Return the codes of rows, as the format unpacks them."""


class _Lut(_Family):
    """Codes in lanes, tables and factors."""

    def __init__(self, spec: KernelSpec, tensors: dict[str, Tensor]) -> None:
        super().__init__(spec, tensors)
        from bitmill.runtime.triton import lut

        format = spec.format
        assert isinstance(format, ScalarFormat)
        self._operator = lut.lut
        codes = to_lanes(tensors["codes"], format.bits, spec.shape[1], self.width)
        made = lut.prepare(format.lookup(self.params()), codes, spec.shape, self.width)
        self._parts, self._plan = [self._shared(part) for part in made.parts()], made.plan()

    @property
    def tensors(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Codes, tables and factors as the kernel reads them, and the packed parameters where these differ."""
        own = {id(tensor) for tensor in self.packed.values()}
        parts = {
            f"triton_{i}": part for i, part in enumerate(self._parts) if part is not None and id(part) not in own
        }
        return {**parts, **{f"triton_packed_{name}": tensor for name, tensor in self.packed.items()}}

    def restore(self) -> dict[str, Tensor]:
        """Return the packed tensors, bit by bit."""
        assert self._parts[0] is not None
        return {"codes": from_words(self._parts[0], self.spec.shape[1], self.width, codes_of_lanes), **self.packed}

    def apply(self, x: Tensor) -> Tensor:
        """Multiply x (tokens, in) to (tokens, out)."""
        return self._operator(x, *self._parts, self._plan)

    def codes(self, rows: slice | Tensor) -> Tensor:
        """Return the codes of rows."""
        assert self._parts[0] is not None
        return codes_of_lanes(self._parts[0][rows], self.spec.shape[1], self.width)

    def _shared(self, part: Tensor | None) -> Tensor | None:
        """Return the packed tensor that equals a part, if there is one, so that it is held once."""
        if part is None:
            return None
        same = (p for p in self.packed.values() if p.dtype == part.dtype and torch.equal(p, part))
        return next(same, part)


class _Binary(_Family):
    """Planes in lanes, magnitudes and offsets."""

    def __init__(self, spec: KernelSpec, tensors: dict[str, Tensor]) -> None:
        super().__init__(spec, tensors)
        from bitmill.runtime.triton import binary

        assert isinstance(spec.format, BinaryCoding)
        self._operator = binary.binary
        self._codes = to_planes(tensors["codes"], spec.format.bits, spec.shape[1], self.width)

    @property
    def tensors(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Planes, and the parameters as packed."""
        return {"triton_codes": self._codes, **self.packed}

    def restore(self) -> dict[str, Tensor]:
        """Return the packed tensors, bit by bit."""
        return {"codes": from_words(self._codes, self.spec.shape[1], self.width, codes_of_planes), **self.packed}

    def apply(self, x: Tensor) -> Tensor:
        """Multiply x (tokens, in) to (tokens, out)."""
        plan = [*self.spec.shape, self.width]
        return self._operator(x, self._codes, self.packed["alpha"], self.packed.get("beta"), plan)

    def codes(self, rows: slice | Tensor) -> Tensor:
        """Return the codes of rows."""
        return codes_of_planes(self._codes[rows], self.spec.shape[1], self.width)


class _Additive(_Family):
    """Everything as packed."""

    def __init__(self, spec: KernelSpec, tensors: dict[str, Tensor]) -> None:
        super().__init__(spec, tensors)
        from bitmill.runtime.triton import additive

        self._operator = additive.additive
        self.tensors = tensors

    def apply(self, x: Tensor) -> Tensor:
        """Multiply x (tokens, in) to (tokens, out)."""
        format = self.spec.format
        assert isinstance(format, Additive)
        books = self.tensors["codebooks"].view(format.codebooks, 1 << format.bits, format.block)
        plan = [*self.spec.shape, self.width, format.bits]
        return self._operator(x, self.tensors["codes"], books, self.tensors["scale"], plan)

    def codes(self, rows: slice | Tensor) -> Tensor:
        """Return the codes of rows."""
        return self.spec.format.unpack_codes(self.tensors["codes"][rows], self.spec.shape[1])
