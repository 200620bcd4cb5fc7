"""Cosines and sines of rotary embeddings, by position, from the model's own modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitmill.runtime.decode.families import Family

# Kinds of rotary embedding whose angles depend on the position only.
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")


class Angles:
    """The rotary embedding of a model, with a table of angles where they depend on the position only.

    Attributes:
        rotated: Numbers of a head that rotate; 0 without rotary embedding.
        frequencies: The buffers that a table was computed from.
    """

    def __init__(self, family: Family, base: Any, config: Any) -> None:
        self.family = family
        self.rotary: Any = base.get_submodule(family.rotary) if family.rotary else None
        types = list(config.layer_types) if family.rotary_by_type else []
        self.kinds: list[str] = sorted(set(types))
        self._index = [self.kinds.index(kind) for kind in types]
        self._table: tuple[Tensor, Tensor] | None = None
        self._fixed = self.rotary is None or set(self._rope_types()) <= set(_FIXED_ROPE)
        self._buffers = self._current_buffers()
        self.frequencies = [b for b in self._buffers if self._fixed and not b.is_inference()]
        self.rotated = int(self.at(0)[0].shape[-1])

    def kind_of(self, attention: Any, index: int) -> int:
        """Return which angles rotate the heads of a block, -1 for none."""
        switch = self.family.rotary_switch
        if self.rotary is None or (switch and not getattr(attention, switch)):
            return -1
        return self._index[index] if self._index else 0

    def at(self, position: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (kinds, rotated) of a position."""
        if not self._fixed:
            cos, sin = self._rotate(torch.tensor([[position]]))
            return cos[0], sin[0]
        if self._table is None or position >= len(self._table[0]):
            self._table = self._rotate(torch.arange(max(256, 1 << position.bit_length()))[None])
        cos, sin = self._table
        return cos[position], sin[position]

    def of(self, first: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (tokens, kinds, rotated) of positions from `first` on."""
        if not self._fixed:
            return self._rotate(torch.arange(first, first + tokens)[None])
        self.at(first + tokens - 1)  # extends the table
        assert self._table is not None
        cos, sin = self._table
        return cos[first : first + tokens], sin[first : first + tokens]

    def is_current(self) -> bool:
        """Return True if the table was computed from the present frequencies."""
        return not self._fixed or all(map(_is, self._current_buffers(), self._buffers))

    def _rope_types(self) -> list[str]:
        types = getattr(self.rotary, "rope_type", "default")
        return list(types.values()) if isinstance(types, dict) else [types]

    def _current_buffers(self) -> list[Tensor]:
        if self.rotary is None:
            return []
        names = [f"{kind}_inv_freq" for kind in self.kinds] or ["inv_freq"]
        return [getattr(self.rotary, name) for name in names]

    def _rotate(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (positions, kinds, rotated) of positions (1, positions)."""
        if self.rotary is None:
            empty = torch.empty(positions.shape[1], 0, 0)
            return empty, empty
        given = [{"layer_type": kind} for kind in self.kinds] or [{}]
        both = [self.rotary(torch.empty(0), position_ids=positions, **one) for one in given]
        cos, sin = (torch.stack([pair[side][0].float() for pair in both], 1).contiguous() for side in (0, 1))
        if self.family.repeated_angles:
            cos, sin = (x[..., : x.shape[-1] // 2].repeat_interleave(2, -1) for x in (cos, sin))
        return cos, sin


def _is(first: Any, second: Any) -> bool:
    return first is second
