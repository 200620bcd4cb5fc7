"""Statistics of a layer's inputs and of the loss, collected by calibration for solvers, wrappers and tuners.

A change of a weight matrix changes its statistics: `permute`, `scale` and `rotate` return those of a layer whose
inputs are permuted, scaled or rotated, so that a wrapper never transforms them one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from bitmill.errors import NumericsError
from bitmill.numerics.rotations import Rotation

NOTHING: frozenset[str] = frozenset()
GRAM = frozenset({"gram"})
FISHER = frozenset({"fisher"})
# Statistics that each weighting of squared errors needs: none, the mean square of the weight's input, or the mean
# squared gradient of the loss.
WEIGHTED = {"nothing": NOTHING, "diagonal": GRAM, "fisher": FISHER}
STATISTICS = ("gram", "cross", "fisher")  # what `needs` may name

_Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Statistics:
    """Statistics of linear layers that read one input X (tokens, columns); None where not collected.

    gram      X^T X / tokens, fp32 (columns, columns)
    tokens    number of tokens in the averages
    cross     (X_float - X)^T X / tokens, fp32 (columns, columns): the effect of earlier errors on the inputs
    fisher    mean over sequences of the squared gradient of the loss, fp32 (rows, columns)
    shared    parts that all layers of a kind share, learned before the first block; a solver leaves them unchanged
    mean_abs  mean of |X| in every column, fp32 (columns,)
    max_abs   maximum of |X| in every column, fp32 (columns,)
    samples   some tokens of X, fp32 (some, columns)
    """

    gram: Tensor | None = None
    tokens: int = 0
    cross: Tensor | None = None
    fisher: Tensor | None = None
    shared: dict[str, Tensor] | None = None
    mean_abs: Tensor | None = None
    max_abs: Tensor | None = None
    samples: Tensor | None = None

    def restrict(self, needs: frozenset[str]) -> Statistics:
        """Return the statistics named in `needs` alone; "activations" stands for gram, mean_abs and max_abs."""
        seen = "activations" in needs
        return replace(
            self,
            gram=self.gram if seen or needs & {"gram", "cross"} else None,
            cross=self.cross if "cross" in needs else None,
            fisher=self.fisher if "fisher" in needs else None,
            mean_abs=self.mean_abs if seen else None,
            max_abs=self.max_abs if seen else None,
            samples=self.samples if "samples" in needs else None,
        )

    # -- required parts -----------------------------------------------------------------------------------

    def required_gram(self, user: str) -> Tensor:
        """Return the Gram matrix. Raises NumericsError, naming the user, when there is none."""
        return _required(self.gram, user, "the Gram matrix of the layer's inputs")

    def required_cross(self, user: str) -> Tensor:
        """Return the cross-Gram matrix. Raises NumericsError, naming the user, when there is none."""
        return _required(self.cross, user, "the float model's inputs in addition to the quantized model's")

    def required_fisher(self, user: str) -> Tensor:
        """Return the Fisher diagonal. Raises NumericsError, naming the user, when there is none."""
        return _required(self.fisher, user, "squared gradients of the loss")

    def required_mean_abs(self, user: str) -> Tensor:
        """Return the mean |X| of every column. Raises NumericsError, naming the user, when there is none."""
        return _required(self.mean_abs, user, "the magnitudes of the layer's inputs")

    def required_max_abs(self, user: str) -> Tensor:
        """Return the maximum |X| of every column. Raises NumericsError, naming the user, when there is none."""
        return _required(self.max_abs, user, "the magnitudes of the layer's inputs")

    def required_samples(self, user: str) -> Tensor:
        """Return some of the inputs. Raises NumericsError, naming the user, when there are none."""
        return _required(self.samples, user, "some of the layer's inputs")

    def importance(self, weighted: str, user: str) -> Tensor | None:
        """Return the weights of squared errors.

        Args:
            weighted: a key of WEIGHTED.
            user: the solver's name, for the error message.

        Returns:
            None for equal weights, (columns,) for "diagonal", (rows, columns) for "fisher".

        Raises:
            NumericsError: when the statistics that `weighted` needs were not collected.
        """
        if weighted == "fisher":
            return self.required_fisher(user)
        return self.required_gram(user).diagonal() if weighted == "diagonal" else None

    # -- statistics of a changed layer --------------------------------------------------------------------

    def split(self, sizes: list[int]) -> list[Statistics]:
        """Return the statistics of each of several stacked layers: rows are cut, those of inputs are shared.

        Args:
            sizes: rows of each layer, in order.
        """
        fishers = [None] * len(sizes) if self.fisher is None else self.fisher.split(sizes)
        return [replace(self, fisher=fisher, shared=None) for fisher in fishers]

    def permute(self, order: Tensor) -> Statistics:
        """Return the statistics of W[:, order], whose inputs are X[:, order].

        Args:
            order: int64, a permutation of the columns, or some of them.
        """
        return self._map(lambda v: v[..., order], lambda G: G[order][:, order], lambda F: F[:, order])

    def scale(self, columns: Tensor) -> Statistics:
        """Return the statistics of W * columns, whose inputs are X / columns.

        Args:
            columns: positive, fp32 (columns,).
        """
        outer = columns[:, None] * columns[None, :]
        return self._map(lambda v: v / columns, lambda G: G / outer, lambda F: F / columns.square())

    def rotate(self, V: Rotation, divisor: Tensor | None = None) -> Statistics:
        """Return the statistics of a layer whose inputs are V (X / divisor); its outputs may be rotated too.

        Only the squares of gradients are known, so in a rotated basis every weight gets their mean. Magnitudes of
        single columns have no counterpart there and become None; sampled tokens are rotated.

        Args:
            V: rotation of the columns.
            divisor: fp32 (columns,); None for no scaling.
        """
        gram, cross = self.gram, self.cross
        if divisor is not None:
            gram, cross = (None if G is None else G / divisor / divisor[:, None] for G in (gram, cross))
        if gram is not None:
            gram = V.congruent(gram)
            gram = (gram + gram.T) / 2  # symmetric but for rounding
        if cross is not None:
            cross = V.congruent(cross)
        fisher = None if self.fisher is None else self.fisher.mean().expand(self.fisher.shape)
        samples = self.samples
        if samples is not None:
            samples = V.forward(samples if divisor is None else samples / divisor)
        return replace(self, gram=gram, cross=cross, fisher=fisher, mean_abs=None, max_abs=None, samples=samples)

    def exclude(self, mask: Tensor) -> Statistics:
        """Return the statistics with zero Fisher information at masked weights: their errors do not count.

        Args:
            mask: bool (rows, columns).
        """
        return self if self.fisher is None else replace(self, fisher=self.fisher.masked_fill(mask, 0))

    def _map(self, vector: _Change, square: _Change, weights: _Change) -> Statistics:
        """Change the statistics of shapes (..., columns), (columns, columns) and (rows, columns)."""

        def changed(change: _Change, value: Tensor | None) -> Tensor | None:
            return None if value is None else change(value)

        return replace(
            self,
            gram=changed(square, self.gram),
            cross=changed(square, self.cross),
            fisher=changed(weights, self.fisher),
            mean_abs=changed(vector, self.mean_abs),
            max_abs=changed(vector, self.max_abs),
            samples=changed(vector, self.samples),
        )


def _required(value: Tensor | None, user: str, described: str) -> Tensor:
    if value is None:
        raise NumericsError(f"{user} needs {described}; run it with calibration text.")
    return value
