"""A coefficient for each unit, from noise of known size, times the relative error of a candidate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bitmill.numerics.rng import normals
from bitmill.sensitivities.base import SENSITIVITIES, Change, LoadedBlock, Meter, Run, Sensitivity
from bitmill.sensitivities.divergence import Divergences


@SENSITIVITIES.register("noise")
@dataclass(frozen=True)
class Noise(Sensitivity):
    """KL = alpha_u error_u: the linear model of HIGGS, one pass for each unit instead of each candidate.

    alpha_u is the divergence with Gaussian noise of relative size `level` on the weights of unit u, over the error
    that this noise makes.

    Cost       one pass through the later blocks for every unit
    Paper      HIGGS (arXiv 2411.17525), which takes errors of the weights; those of the outputs are not in it

    Attributes:
        error: relative squared error of "weights", as in the paper, or of "outputs", so that a solver's
            compensation counts.
        level: standard deviation of the noise, in units of the root mean square of a layer's weights.
        windows: calibration windows.
        tokens: first tokens of each.
        seed: of the noise.
    """

    error: Literal["weights", "outputs"] = "outputs"
    level: float = 0.1
    windows: int = 4
    tokens: int = 256
    seed: int = 0

    def begin(self, run: Run) -> Meter:
        """Let the windows pass the float model."""
        return _Meter(self, Divergences(run.streamed, run.windows[: self.windows, : self.tokens]))


@SENSITIVITIES.register("higgs")
@dataclass(frozen=True)
class Higgs(Noise):
    """The linear model of HIGGS as published: errors of the weights.

    Paper      HIGGS (arXiv 2411.17525)
    """

    error: Literal["weights", "outputs"] = "weights"


class _Meter(Meter):
    def __init__(self, options: Noise, divergences: Divergences) -> None:
        self._options, self._divergences = options, divergences
        self._noise: dict[tuple[str, ...], float] = {}  # layers of a unit -> error that the noise makes
        self._errors: list[tuple[tuple[str, ...], float]] = []

    def add(self, block: LoadedBlock, change: Change) -> None:
        """Keep the error of a change; the first one of a unit is followed by its noise."""
        unit = tuple(change.floats)
        if unit not in self._noise:
            weights = {path: self._noisy(W, block.index, n) for n, (path, W) in enumerate(change.floats.items())}
            self._divergences.add(block, weights)
            self._noise[unit] = self._error(block, Change(weights, change.floats))
        self._errors.append((unit, self._error(block, change)))

    def finish(self, block: LoadedBlock) -> list[float]:
        """Measure the coefficients of all units of the block."""
        divergences = dict(zip(self._noise, self._divergences.finish(block)))
        costs = [divergences[unit] * error / max(self._noise[unit], 1e-30) for unit, error in self._errors]
        self._noise, self._errors = {}, []
        return costs

    def _error(self, block: LoadedBlock, change: Change) -> float:
        return change.weight_error() if self._options.error == "weights" else change.output_error(block.stats)

    def _noisy(self, W: Tensor, block: int, number: int) -> Tensor:
        noise = normals(self._options.seed, 64 * block + number, W.numel()).to(torch.float32).view(W.shape)
        return W + self._options.level * W.square().mean().sqrt() * noise.to(W.device)
