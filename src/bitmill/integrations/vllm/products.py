"""Products with packed layers as one operator, so that vLLM's compiler sees no Python of the kernels."""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

_LAYERS: WeakValueDictionary[int, nn.ModuleList] = WeakValueDictionary()
_NUMBERS = itertools.count()


def number_of(layers: nn.ModuleList) -> int:
    """Return the number by which the operators find some layers, for as long as they live."""
    number = next(_NUMBERS)
    _LAYERS[number] = layers
    return number


@torch.library.custom_op("bitmill::vllm_product", mutates_args=())
def product(x: Tensor, number: int, width: int) -> Tensor:
    """Multiply x (tokens, in) with the matrices of a layer, to (tokens, width).

    Args:
        x: inputs.
        number: of the layers, see `number_of`.
        width: outputs of all matrices.
    """
    outputs = [layer(x) for layer in _LAYERS[number]]
    return torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0].clone()


@product.register_fake
def _(x: Tensor, number: int, width: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], width)


@torch.library.custom_op("bitmill::vllm_rows", mutates_args=())
def rows(ids: Tensor, number: int, width: int, like: Tensor) -> Tensor:
    """Look up token ids (tokens,) as rows (tokens, width) of a table, in the type of `like`."""
    table: Any = _LAYERS[number][0]
    found = table.kernel_on(ids.device).rows(ids.reshape(-1).long())
    return found.to(like.dtype).view(*ids.shape, width)


@rows.register_fake
def _(ids: Tensor, number: int, width: int, like: Tensor) -> Tensor:
    return like.new_empty(*ids.shape, width)
