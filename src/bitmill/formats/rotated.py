"""Rotated: another format for the matrix in a random orthogonal basis.

    W^ = U^T Q V diag(1/s)      Q the matrix in the inner format, U and V orthogonal, made from the seed

    rescale  fp16 s, one a column; with `rescale` alone

In that basis the weights are incoherent: outliers of W are spread over all entries, and rows and columns have
nearly equal sizes, so that a coarse format suffices. At run time V acts on the inputs and U^T on the outputs, in
O(n log n) (`kind` "hadamard") or O(n**1.5) ("orthogonal") operations each, see `numerics.rotations`. With
`rescale`, columns are first scaled by s_j = (G_jj / |W_:j|^2)^(1/4), which balances weights against inputs.

    stored bits: the inner format's; and 16/rows a weight with rescale
    sides        "in" leaves the outputs alone: half the run time cost, and outliers of rows stay

Source: QuIP (Chee et al. 2023, arXiv 2307.13304), section 4; QuIP# (arXiv 2402.04396), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from bitmill.formats.base import FORMATS, Params
from bitmill.formats.fitting import as_stored
from bitmill.formats.part import Part
from bitmill.formats.quantized import Quantized
from bitmill.formats.wrapper import Reduction, Wrapper
from bitmill.numerics.rotations import Rotation, rotation
from bitmill.numerics.statistics import Statistics

_RANGE = 64.0  # s is kept within this factor of 1: the other side of the balance grows by what one side loses


@FORMATS.register("rotated")
@dataclass(frozen=True)
class Rotated(Wrapper):
    """The inner format in a random orthogonal basis of inputs, and of outputs unless `sides` is "in"."""

    kind: Literal["hadamard", "orthogonal"] = "hadamard"
    seed: int = 0
    sides: Literal["both", "in"] = "both"
    rescale: bool = False

    @property
    def needs(self) -> frozenset[str]:
        """The mean squares of the inputs, with rescale."""
        return self.inner.needs | (frozenset({"gram"}) if self.rescale else frozenset())

    @property
    def stackable(self) -> bool:
        """True where the outputs are not rotated and the inner format allows it: rows stay independent."""
        return self.sides == "in" and self.inner.stackable

    def own_parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Return s, with rescale."""
        return (Part("rescale", (1, shape[1])),) if self.rescale else ()

    def on_inputs(self, columns: int, device: torch.device) -> Rotation:
        """Return V.

        Args:
            columns: width of the inputs.
            device: of its tensors.
        """
        return rotation(self.kind, columns, 2 * self.seed, device)

    def on_outputs(self, rows: int, device: torch.device) -> Rotation | None:
        """Return U; None where outputs are not rotated.

        Args:
            rows: width of the outputs.
            device: of its tensors.
        """
        return None if self.sides == "in" else rotation(self.kind, rows, 2 * self.seed + 1, device)

    def damage_reason(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> str | None:
        """Return the inner format's, or that a column has no positive factor."""
        if self.rescale and not bool((tensors["rescale"] > 0).all()):
            return "its rescale is not positive"
        return super().damage_reason(tensors, shape)

    def effective_inputs(self, x: Tensor, params: Params) -> Tensor:
        """Return the inputs that are rounded in the rotated basis, rotated back."""
        if not self.quantizes_inputs:
            return x
        V, s = self.on_inputs(x.shape[-1], x.device), params["rescale"] if self.rescale else None
        turned = V.forward(x.to(torch.float32) if s is None else x.to(torch.float32) / s)
        back = V.inverse(self.inner.effective_inputs(turned, params))
        return (back if s is None else back * s).to(x.dtype)

    def reduce(self, W: Tensor, stats: Statistics) -> Reduction:
        """Reduce to U W diag(s) V^T with the Gram matrix V diag(1/s) G diag(1/s) V^T.

        Raises:
            NumericsError: with `rescale`, when there is no Gram matrix.
        """
        V = self.on_inputs(W.shape[1], W.device)
        if stats.gram is not None:
            W = torch.where(
                stats.gram.diagonal() > 0, W, 0.0
            )  # weights without input would only spread over the basis
        own, s = {}, None
        if self.rescale:
            s = _balance(W, stats.required_gram(self.name))
            own = {"rescale": s[None]}

        def finish(solved: Quantized) -> Quantized:
            return replace(solved, format=self, params={**solved.params, **own})

        return Reduction(self.inner_matrix(W, own), stats.rotate(V, s), finish)

    def inner_matrix(self, W: Tensor, params: Params) -> Tensor:
        """Return U W diag(s) V^T."""
        V, U = self.on_inputs(W.shape[1], W.device), self.on_outputs(W.shape[0], W.device)
        turned = V.forward(W * params["rescale"] if self.rescale else W)
        return turned if U is None else U.forward(turned.T).T.contiguous()

    def assemble(self, inner: Tensor, params: Params, shape: tuple[int, int]) -> Tensor:
        """Rotate the inner matrix back to the basis of the layer."""
        V, U = self.on_inputs(shape[1], inner.device), self.on_outputs(shape[0], inner.device)
        W = inner if U is None else U.inverse(inner.T).T
        W = V.inverse(W.contiguous())
        return W / params["rescale"] if self.rescale else W


def _balance(W: Tensor, gram: Tensor) -> Tensor:
    """Return s (columns,) as stored, of geometric mean about 1; 1 for columns without weights or inputs."""
    inputs, weights = gram.diagonal().to(torch.float64), W.square().sum(0).to(torch.float64)
    live = (inputs > 0) & (weights > 0)
    ratio = torch.where(live, inputs / weights.clamp(min=1e-300), 1.0)
    octaves = ratio.log() / 4
    if bool(live.any()):
        octaves = torch.where(live, octaves - octaves[live].mean(), 0.0)
    return as_stored(octaves.exp().clamp(1 / _RANGE, _RANGE).float())
