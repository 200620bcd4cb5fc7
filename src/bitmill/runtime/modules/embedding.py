"""The quantized table of token embeddings."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

from torch import Tensor, nn

from bitmill.compat import is_traced
from bitmill.formats import Format, GroupFormat
from bitmill.runtime import ops
from bitmill.runtime.modules.packed import PackedMatrix


class QuantEmbedding(PackedMatrix, nn.Embedding):
    """A table of which only the rows that are looked up are decoded.

    If a head is tied to the table, the head's kernel holds the tensors from its first call on and decodes the
    rows.

    For a subclass of nn.Embedding a class is derived from both (`quantized_class`), so that the subclass's own
    forward still applies around the lookup, such as Gemma's factor. `weight` is an empty buffer with the type and
    device of the former weight.
    """

    float_class: ClassVar[type[nn.Embedding]] = nn.Embedding

    def forward(self, input: Tensor) -> Tensor:
        """Look up token ids (...) as rows (..., columns) in the model's type."""
        assert isinstance(self.format, GroupFormat)
        ids = input.reshape(-1).long()
        kernel = self.kernel
        if kernel is not None:
            rows = kernel.rows(ids)
        elif is_traced(input):
            rows = self.kernel_on(self.weight.device).rows(ids)
        else:
            rows = self.format.dequantize_rows(self.packed(), self.shape, ids)
        return rows.to(self.weight.dtype).view(*input.shape, self.shape[1])

    def extra_repr(self) -> str:
        """Return the description in print(model)."""
        return f"{self.shape[0]} x {self.shape[1]}, {self.format!r}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the float class: the derived classes are not importable."""
        return _new_quantized, (self.float_class,), self.__getstate__()


@cache
def quantized_class(kind: type[nn.Embedding]) -> type[QuantEmbedding]:
    """Return the class whose forward is that of `kind`, with super().forward looking up decoded rows."""
    if kind is nn.Embedding:
        return QuantEmbedding
    return type(f"Quant{kind.__name__}", (kind, QuantEmbedding), {"float_class": kind})


def _new_quantized(kind: type[nn.Embedding]) -> QuantEmbedding:
    made = quantized_class(kind)  # type: ignore[arg-type]
    return made.__new__(made)


def replace_embedding(model: nn.Module, name: str, format: Format, device: Any = None) -> QuantEmbedding:
    """Replace a table of embeddings by an empty QuantEmbedding, wherever the model uses it.

    Args:
        model: The model, changed in place.
        name: Path of the nn.Embedding.
        format: Format of the table.
        device: Device of the packed tensors.

    Returns:
        The new table.
    """
    old = model.get_submodule(name)
    assert isinstance(old, nn.Embedding)
    rows, columns = old.weight.shape
    new = _new_quantized(type(old))
    _copy_state(old, new, skipped={"weight"})
    new.register_buffer("weight", old.weight.data.new_empty(rows, 0), persistent=False)
    new.format, new.shape, new._format_json = format, (rows, columns), ops.format_to_json(format)
    new.allocate(format.layout(new.shape), device)
    _replace_everywhere(model, old, new)
    return new


def restore_embedding(model: nn.Module, table: QuantEmbedding, weight: Tensor) -> nn.Embedding:
    """Replace a QuantEmbedding by a float table of its former class, wherever the model uses it.

    Args:
        model: The model, changed in place.
        table: The table in it.
        weight: The weight (rows, columns) of the float table.

    Returns:
        The float table.
    """
    new = table.float_class.__new__(table.float_class)
    kernel_tensors = table.kernel.tensors if table.kernel is not None else {}
    quantized = {"format", "shape", "outside_blocks", "_packed_names", "kernel", "_format_json"}
    _copy_state(table, new, skipped={"weight", *table._packed_names, *kernel_tensors, *quantized})
    new.weight = nn.Parameter(weight, requires_grad=False)
    _replace_everywhere(model, table, new)
    return new


def _copy_state(old: nn.Module, new: nn.Module, skipped: set[str]) -> None:
    """Initialize `new` as a module with the attributes, parameters and buffers of `old`, except for some."""
    nn.Module.__init__(new)
    for name in vars(new).keys() & vars(old).keys():
        if name == "_modules" or name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            vars(new)[name] = vars(old)[name]  # handles of hooks refer to these dictionaries
    for name, value in vars(old).items():
        if name not in vars(new) and name not in skipped:
            setattr(new, name, value)
    for name, parameter in old.named_parameters(recurse=False):
        if name not in skipped:
            new.register_parameter(name, parameter)
    for name, buffer in old.named_buffers(recurse=False):
        if name not in skipped:
            new.register_buffer(name, buffer, persistent=name not in old._non_persistent_buffers_set)
    new.training = old.training


def _replace_everywhere(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child is old:
                setattr(module, name, new)
