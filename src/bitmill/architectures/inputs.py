"""The inputs of a linear layer as a site: rounded before a float layer multiplies them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Rounding = Callable[[Tensor], Tensor]  # of inputs (..., columns)

_HOOK = "_bitmill_inputs"


def hook_inputs(linear: nn.Module, rounding: Rounding | None, *, differentiable: bool = False) -> None:
    """Round the inputs of a layer, in place of an earlier rounding.

    Gradients pass the rounding as if it were the identity.

    Args:
        linear: the layer.
        rounding: returns rounded inputs; None leaves them as they are.
        differentiable: the rounding passes gradients itself.
    """
    _unhook(linear)
    if rounding is None:
        return

    def round_inputs(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x = arguments[0]
        if differentiable:
            return (rounding(x), *arguments[1:])
        rounded = rounding(x.detach())
        if torch.is_grad_enabled() and x.requires_grad:  # straight through
            rounded = x + (rounded - x).detach()
        return (rounded, *arguments[1:])

    setattr(linear, _HOOK, linear.register_forward_pre_hook(round_inputs))


def unhook_inputs(model: nn.Module) -> None:
    """Remove every hook of `hook_inputs` inside a model."""
    for module in model.modules():
        _unhook(module)


def _unhook(module: nn.Module) -> None:
    if handle := module.__dict__.pop(_HOOK, None):
        handle.remove()
