"""Let a float linear layer with decoded weights multiply the inputs that its packed form multiplies."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from bitmill.formats.quantized import Quantized

_HOOK = "_bitmill_inputs"


def hook_inputs(linear: nn.Module, quantized: Quantized) -> None:
    """Round the inputs of a layer as a quantized matrix does, in place of an earlier one.

    Gradients pass the rounding as if it were the identity.

    Args:
        linear: the layer, with the decoded weight.
        quantized: the matrix; nothing is done unless its format quantizes inputs.
    """
    _unhook(linear)
    if quantized.format.quantizes_inputs:
        kept = replace(quantized, codes=torch.empty(0))

        def round_inputs(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            x = arguments[0]
            rounded = kept.effective_inputs(x.detach())
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
