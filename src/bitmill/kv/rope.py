"""Rotary embeddings: undone before keys are stored, done again when they are read.

Both must turn by the same angles, and need not know where a sequence begins: what is stored differs then by a
fixed turn. What is calibrated per channel fits best where positions are true.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.errors import UsageError
from bitmill.kv.scheme import Scheme

_PROBE = (0, 1, 31, 1023)  # positions at which the model's own embedding is compared with this one
_APART = 1e-4


@dataclass(frozen=True)
class Rope:
    """Angles of a rotary embedding whose pairs are channel f and f + dim / 2.

    frequencies: (dim / 2,) fp64, radians a position.  factor: what cos and sin are multiplied by.
    """

    frequencies: Tensor
    factor: float = 1.0

    def apply(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn x (rows, heads, tokens, dim) at positions (rows|1, tokens)."""
        cos, sin = self._table(positions)
        return (x * cos + _half_turned(x) * sin) * self.factor

    def undo(self, x: Tensor, positions: Tensor) -> Tensor:
        """The inverse of `apply`."""
        cos, sin = self._table(positions)
        return (x * cos - _half_turned(x) * sin) / self.factor

    def undo_gradient(self, gradient: Tensor, positions: Tensor) -> Tensor:
        """The gradient of what `apply` was given, from that of what it gave."""
        return self.undo(gradient, positions) * self.factor**2

    def _table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[:, None, :, None].double() * self.frequencies.to(positions.device)
        angles = torch.cat([angles, angles], -1)
        return angles.cos().float(), angles.sin().float()


def _half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def attentions(model: nn.Module) -> dict[int, Any]:
    """The attention modules of a model by the numbers of their layers."""
    modules: list[Any] = [m for m in model.modules() if hasattr(m, "head_dim")]
    return {m.layer_idx: m for m in modules if isinstance(getattr(m, "layer_idx", None), int)}


def rope_of(model: nn.Module, attention: Any, layer_type: str) -> Rope | None:
    """The rotary embedding of a layer; None where it is of another kind, or changes with the length."""
    if attention is None:
        return None
    rotary: Any = next((m for name, m in model.named_modules() if name.split(".")[-1] == "rotary_emb"), None)
    apply_rotary = vars(sys.modules[type(attention).__module__]).get("apply_rotary_pos_emb")
    if rotary is None or apply_rotary is None:
        return None
    several = hasattr(rotary, f"{layer_type}_inv_freq")
    prefix = f"{layer_type}_" if several else ""
    kind = getattr(rotary, "rope_type", "default")
    kind = kind.get(layer_type) if isinstance(kind, dict) else kind
    if kind not in ("default", "linear", "llama3", "yarn"):
        return None
    rope = Rope(
        getattr(rotary, f"{prefix}inv_freq").double().cpu(),
        float(getattr(rotary, f"{prefix}attention_scaling", 1.0)),
    )
    dim = attention.head_dim
    if rope.frequencies.shape[0] * 2 != dim:
        return None
    positions = torch.tensor([_PROBE])
    x = torch.linspace(-1, 1, 2 * len(_PROBE) * dim).view(1, 2, len(_PROBE), dim)
    cos, sin = rotary(x, positions, layer_type) if several else rotary(x, positions)
    theirs, _ = apply_rotary(x, x, cos, sin)
    return rope if bool((rope.apply(x, positions) - theirs).abs().max() < _APART) else None


def rope_for(model: Any, scheme: Scheme, number: int) -> Rope | None:
    """The rotary embedding that is undone in a layer, None where keys are stored after it. Raises UsageError."""
    if not scheme.pre_rope:
        return None
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None)
    attention = attentions(model).get(number)
    if attention is not None and not getattr(attention, "use_rope", True):
        return None  # a layer without positions, between others that have them
    rope = rope_of(model, attention, str(kinds[number]) if kinds else "full_attention")
    if rope is None:
        raise UsageError(
            f"{type(model).__name__} has no rotary embedding that can be undone; use pre_rope=false (--kv-set)."
        )
    return rope
