"""The types that layers round their inputs to, for a few tokens at a time and for many.

BITMILL_ACTIVATIONS chooses them:

    not set    few tokens int8, many int16: whole windows, on which quality is measured, are as precise as fp16
    recipe     as if not set: the recipe alone decides what else is rounded
    int8       few and many tokens int8
    int16      few and many tokens int16
    float32    no rounding
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from bitmill.errors import UsageError

ACTIVATIONS = ("int8", "int16", "float32")  # csrc/lut/lookup.h: Act
RECIPE = "recipe"


@dataclass(frozen=True)
class Activations:
    """The setting of a layer.

    Attributes:
        few: Type for up to `kernels.compiled.MAX_TOKENS` tokens at a time, which multiply with packed weights.
        many: Type for more of them.
        step_columns: Columns of a token that share a step where many tokens are rounded to int8: a number of whole
            groups of the weight, or a part of one that 16 divides; at least the columns of the layer for one step
            per token; 0 for 64 columns, or the columns of a group where those are fewer.
    """

    few: str = "int8"
    many: str = "int16"
    step_columns: int = 0

    @property
    def name(self) -> str:
        """The type for few tokens, and that for many where it is another one."""
        return self.few if self.few == self.many else f"{self.few}, {self.many} for many tokens"


def activations() -> Activations:
    """Return the setting of BITMILL_ACTIVATIONS. Raises UsageError for an unknown one."""
    name = os.environ.get("BITMILL_ACTIVATIONS")
    if not name or name == RECIPE:
        return Activations()
    if name not in ACTIVATIONS:
        raise UsageError(f"BITMILL_ACTIVATIONS is {name!r}; use one of: {', '.join((*ACTIVATIONS, RECIPE))}.")
    return Activations(name, name)
