"""Statistics of a layer's inputs and gradients, collected by calibration."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bitmill.errors import NumericsError

NOTHING: frozenset[str] = frozenset()
GRAM = frozenset({"gram"})
FISHER = frozenset({"fisher"})
# What a squared weight error may count by, and the statistics that takes: nothing, the mean square of the
# weight's input, or the mean squared gradient of the loss.
WEIGHTED = {"nothing": NOTHING, "diagonal": GRAM, "fisher": FISHER}
STATISTICS = ("gram", "cross", "fisher")  # what `needs` may name


@dataclass(frozen=True)
class Statistics:
    """What is known of one layer before it is solved; None where nobody asked.

    gram    X^T X / tokens, fp32 (columns, columns), of the inputs X (tokens, columns)
    cross   (X_float - X)^T X / tokens, fp32 (columns, columns): what earlier layers' errors did to the inputs
    fisher  mean over sequences of the squared gradient of the loss, fp32 (rows, columns)
    shared  parts that all layers of the kind share, learned before the first block and to be taken as they are
    """

    gram: Tensor | None = None
    tokens: int = 0
    cross: Tensor | None = None
    fisher: Tensor | None = None
    shared: dict[str, Tensor] | None = None

    def required_gram(self, solver: str) -> Tensor:
        """The Gram matrix. Raises NumericsError, naming the solver that needs it, when there is none."""
        if self.gram is None:
            raise NumericsError(
                f"{solver} needs the Gram matrix of the layer's inputs; run it with calibration text."
            )
        return self.gram

    def required_fisher(self, solver: str) -> Tensor:
        """The Fisher diagonal. Raises NumericsError, naming the solver that needs it, when there is none."""
        if self.fisher is None:
            raise NumericsError(f"{solver} needs squared gradients of the loss; run it with calibration text.")
        return self.fisher

    def importance(self, weighted: str, solver: str) -> Tensor | None:
        """What errors count by, see WEIGHTED: None, (columns,) or (rows, columns)."""
        if weighted == "fisher":
            return self.required_fisher(solver)
        return self.required_gram(solver).diagonal() if weighted == "diagonal" else None

    def split(self, sizes: list[int]) -> list[Statistics]:
        """The statistics of stacked layers, apart: rows are cut, what belongs to the inputs is shared."""
        fishers = [None] * len(sizes) if self.fisher is None else self.fisher.split(sizes)
        return [Statistics(self.gram, self.tokens, self.cross, fisher) for fisher in fishers]


@dataclass(frozen=True)
class Activations:
    """What calibration saw of the tensor X (tokens, channels) that several linears read.

    gram: X^T X / tokens, (channels, channels).  mean_abs, max_abs: of every channel.
    """

    gram: Tensor
    mean_abs: Tensor
    max_abs: Tensor
    tokens: int

    def divided(self, scale: Tensor) -> Activations:
        """The same for X / scale."""
        gram = self.gram / (scale[:, None] * scale[None, :])
        return Activations(gram, self.mean_abs / scale, self.max_abs / scale, self.tokens)
