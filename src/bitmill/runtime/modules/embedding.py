"""The quantized table of token embeddings."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

from torch import Tensor, nn

from bitmill.formats import Format, GroupFormat
from bitmill.runtime import ops
from bitmill.runtime.modules.packed import PackedMatrix


class QuantEmbedding(PackedMatrix, nn.Embedding):
    """A table of which only the rows that are looked up are decoded.

    Where a head is tied to it, the head's kernel has the tensors from its first call on, and the rows are asked of
    that: the two never take turns.

    A layer becomes one in place (`replace_embedding`) and keeps what its own class does around the lookup, such as
    Gemma's factor; `weight` is left as an empty buffer, for whoever asks for its type or device.
    """

    plain: ClassVar[type[nn.Embedding]] = nn.Embedding

    def forward(self, input: Tensor) -> Tensor:
        """Token ids (...) to their rows (..., columns), in the model's type."""
        assert isinstance(self.format, GroupFormat)
        ids = input.reshape(-1).long()
        kernel = self._kernel
        if kernel is not None:
            rows = kernel.rows(ids)
        elif ops.is_traced(input):
            rows = self.kernel_on(self.weight.device).rows(ids)
        else:
            rows = self.format.dequantize_rows(self.packed(), self.shape, ids)
        return rows.to(self.weight.dtype).view(*input.shape, self.shape[1])

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.shape[0]} x {self.shape[1]}, {self.format!r}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles by the float layer's class: no module has one made by `_quantized`."""
        return _blank, (self.plain,), vars(self).copy()


def _blank(kind: type[nn.Embedding]) -> QuantEmbedding:
    made = _quantized(kind)  # type: ignore[arg-type]
    return made.__new__(made)


@cache
def _quantized(kind: type[nn.Embedding]) -> type[QuantEmbedding]:
    """`kind` above a quantized table: what it says of super().forward it says of the rows looked up."""
    if kind is nn.Embedding:
        return QuantEmbedding
    return type(f"Quant{kind.__name__}", (kind, QuantEmbedding), {"plain": kind})


def replace_embedding(model: nn.Module, name: str, format: Format, device: Any = None) -> QuantEmbedding:
    """Turn the nn.Embedding called `name` into an empty QuantEmbedding, in place, and return it."""
    table = model.get_submodule(name)
    assert isinstance(table, nn.Embedding)
    rows, columns = table.weight.shape
    stand_in = table.weight.data.new_empty(rows, 0)
    del table._parameters["weight"]
    table.__class__ = _quantized(type(table))  # type: ignore[arg-type]
    assert isinstance(table, QuantEmbedding)
    table.register_buffer("weight", stand_in, persistent=False)
    table.format, table.shape, table._text = format, (rows, columns), ops.text_of(format)
    table.hold(format.layout(table.shape), device)
    return table


def restore_embedding(table: QuantEmbedding, weight: Tensor) -> None:
    """The inverse: make the layer what it was, with another weight (rows, columns)."""
    for name in (*table.packed(), "weight"):
        del table._buffers[name]
    for name in ("format", "shape", "outside_blocks", "_held", "_kernel", "_text"):
        vars(table).pop(name, None)
    table.__class__ = table.plain  # type: ignore[assignment]
    table.weight = nn.Parameter(weight, requires_grad=False)
    table._non_persistent_buffers_set.discard("weight")
