"""The options of an end-to-end training."""

from __future__ import annotations

from dataclasses import dataclass

from bitmill.errors import UsageError
from bitmill.training.loss import LossName
from bitmill.training.student import Learn


@dataclass(frozen=True)
class TrainingOptions:
    """How a quantized model is trained.

    loss: "kl" from the float model's predictions, or "next-token" from the text alone.
    learn: "scales" are the numbers that formats store, "norms" the norms and biases of the blocks.
    epochs: passes over the windows.
    rate: of Adam, in units of the root mean square of each parameter's row; falls linearly to 0.
    tokens: in a step, in whole windows.
    held_apart: windows that are not trained on, and choose the state that is kept.
    max_minutes: training ends after this time, as if its epochs were over; None for no limit.

    Raises:
        UsageError: a number is out of range.
    """

    loss: LossName = "kl"
    learn: Learn = "all"
    epochs: int = 1
    rate: float = 1e-3
    tokens: int = 512
    held_apart: int = 8
    max_minutes: float | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "rate", "tokens", "held_apart", "max_minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"{name} is {value!r}; use a number above 0.")
