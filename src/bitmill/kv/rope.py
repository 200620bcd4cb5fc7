"""Rotary position embeddings: undone before keys are stored, applied again when keys are read.

Both rotate by the same angles; an offset of all positions of a sequence only adds a constant rotation to the
stored keys. Parameters calibrated per channel fit best at true positions.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.errors import UsageError
from bitmill.kv.scheme import Scheme

_PROBE_POSITIONS = (0, 1, 31, 1023)  # where the model's own embedding is compared with `Rope`
_TOLERANCE = 1e-4
_SUPPORTED_TYPES = ("default", "linear", "llama3", "yarn")  # angles do not depend on the sequence length


@dataclass(frozen=True)
class Rope:
    """Rotary embedding whose pairs are the channels f and f + dim / 2 (half-split).

    Attributes:
        frequencies: (dim / 2,) fp64, radians per position.
        factor: multiplier of cos and sin.
    """

    frequencies: Tensor
    factor: float = 1.0

    def apply(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate x.

        Args:
            x: (rows, heads, tokens, dim).
            positions: (rows or 1, tokens).

        Returns:
            Rotated numbers, of the shape of x.
        """
        cos, sin = self._cos_sin(positions)
        return (x * cos + _rotate_half(x) * sin) * self.factor

    def undo(self, x: Tensor, positions: Tensor) -> Tensor:
        """Return the inverse of `apply`, with its arguments."""
        cos, sin = self._cos_sin(positions)
        return (x * cos - _rotate_half(x) * sin) / self.factor

    def undo_gradient(self, gradient: Tensor, positions: Tensor) -> Tensor:
        """Return the gradient with respect to the input of `apply`.

        Args:
            gradient: with respect to its output, (rows, heads, tokens, dim).
            positions: (rows or 1, tokens).

        Returns:
            Gradient, of the shape of `gradient`.
        """
        return self.undo(gradient, positions) * self.factor**2

    def _cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[:, None, :, None].double() * self.frequencies.to(positions.device)
        angles = torch.cat([angles, angles], -1)
        return angles.cos().float(), angles.sin().float()


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def attention_modules(model: nn.Module) -> dict[int, Any]:
    """Return the attention modules of a model by layer index."""
    modules: list[Any] = [m for m in model.modules() if hasattr(m, "head_dim")]
    return {m.layer_idx: m for m in modules if isinstance(getattr(m, "layer_idx", None), int)}


def find_rope(model: nn.Module, attention: Any, layer_type: str) -> Rope | None:
    """Return the rotary embedding of an attention module.

    Args:
        model: the model.
        attention: attention module of a layer, or None.
        layer_type: such as "full_attention", where types have angles of their own.

    Returns:
        The embedding; None for one of another kind, or one whose angles depend on the sequence length. The model's
        own function, tried on numbers, must agree with it.
    """
    if attention is None:
        return None
    rotary: Any = next((m for name, m in model.named_modules() if name.split(".")[-1] == "rotary_emb"), None)
    apply_rotary = vars(sys.modules[type(attention).__module__]).get("apply_rotary_pos_emb")
    if rotary is None or apply_rotary is None:
        return None
    is_per_type = hasattr(rotary, f"{layer_type}_inv_freq")
    prefix = f"{layer_type}_" if is_per_type else ""
    rope_type = getattr(rotary, "rope_type", "default")
    rope_type = rope_type.get(layer_type) if isinstance(rope_type, dict) else rope_type
    if rope_type not in _SUPPORTED_TYPES:
        return None
    frequencies, dim = getattr(rotary, f"{prefix}inv_freq", None), attention.head_dim
    if not isinstance(frequencies, Tensor) or frequencies.shape[0] * 2 != dim:
        return None  # a part of the channels, or pairs of neighbours as in GPT-J
    rope = Rope(frequencies.double().cpu(), float(getattr(rotary, f"{prefix}attention_scaling", 1.0)))
    positions = torch.tensor([_PROBE_POSITIONS])
    x = torch.linspace(-1, 1, 2 * positions.numel() * dim).view(1, 2, -1, dim)
    try:
        cos, sin = rotary(x, positions, layer_type) if is_per_type else rotary(x, positions)
        expected, _ = apply_rotary(x, x, cos, sin)
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError):
        return None  # functions of another signature
    return rope if bool((rope.apply(x, positions) - expected).abs().max() < _TOLERANCE) else None


def rope_to_undo(model: Any, scheme: Scheme, layer: int) -> Rope | None:
    """Return the rotary embedding that is undone before the keys of a layer are stored.

    Args:
        model: the model.
        scheme: storage scheme.
        layer: layer index.

    Returns:
        The embedding; None where keys are stored after RoPE, or the layer has no positions.

    Raises:
        UsageError: the layer has no rotary embedding that can be undone.
    """
    if not scheme.pre_rope:
        return None
    layer_types = getattr(model.config.get_text_config(decoder=True), "layer_types", None)
    attention = attention_modules(model).get(layer)
    if attention is not None and not getattr(attention, "use_rope", True):
        return None  # a layer without positions, between others that have them
    rope = find_rope(model, attention, str(layer_types[layer]) if layer_types else "full_attention")
    if rope is None:
        raise UsageError(
            f"{type(model).__name__} has no rotary embedding that can be undone; use pre_rope=false (--kv-set)."
        )
    return rope
