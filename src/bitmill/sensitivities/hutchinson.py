"""Trace of the Hessian times the squared perturbation."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from bitmill.calibration.gradients import walk_gradients
from bitmill.models.streamed import StreamedModel
from bitmill.numerics.rng import signs
from bitmill.sensitivities.base import SENSITIVITIES, Change, LoadedBlock, LocalMeter, Meter, Run, Sensitivity
from bitmill.sensitivities.taylor import add_gradient

_LEAST = 0.01  # share of the mean trace: estimates scatter below zero


@SENSITIVITIES.register("hutchinson")
@dataclass(frozen=True)
class Hutchinson(Sensitivity):
    """1/2 tr(H) / n |D|^2,  D = W - W^,  H the Hessian of the loss by the n weights of a layer.

    tr(H) = E[v^T H v] over random signs v, which all layers have at once: products of different layers vanish in
    the mean. H v is the difference of the gradients at W + step v and W - step v, divided by twice the step.

    Cost       about ten forward passes over the windows for each probe
    Paper      HAWQ-V2 (arXiv 1911.03852)

    Attributes:
        windows: calibration windows.
        probes: vectors of signs.
        step: of the difference, in units of the root mean square of a layer's weights.
    """

    windows: int = 8
    probes: int = 1
    step: float = 0.01

    def begin(self, run: Run) -> Meter:
        """Measure the mean of the Hessian's diagonal for every layer."""
        windows, curvatures = run.windows[: self.windows], dict[str, float]()
        run.progress.start("Hessian traces", 4 * self.probes * len(run.streamed.blocks))
        with tempfile.TemporaryDirectory(prefix="bitmill-") as folder:
            for seed in range(self.probes):
                for direction in (1.0, -1.0):
                    probe = _Probe(run.streamed, seed, direction * self.step)
                    passes = walk_gradients(
                        run.streamed, windows, Path(folder), run.progress, add_gradient, probe.change
                    )
                    for index, gradients in passes:
                        for path, gradient in gradients.items():
                            name = f"{run.streamed.block_name(index)}.{path}"
                            share = direction * probe.curvature(name, gradient) / (2 * len(windows) * self.probes)
                            curvatures[name] = curvatures.get(name, 0.0) + share
        return _Meter(run.streamed, curvatures)


class _Probe:
    """A vector of signs for every layer, by which weights are changed."""

    def __init__(self, streamed: StreamedModel, seed: int, step: float) -> None:
        self._streamed, self._seed, self._step = streamed, seed, step
        self._number = {site.layer: number for number, site in enumerate(streamed.all_sites())}
        self._scale: dict[str, float] = {}

    def change(self, index: int) -> None:
        """Change the weights of a loaded block."""
        for site in self._streamed.sites(index):
            W = self._streamed.matrix(site.path)
            self._scale[site.layer] = scale = max(float(W.square().mean().sqrt()), 1e-12)
            v = self._signs(site.layer, W)
            self._streamed.set_matrix(site.path, W + self._step * scale * v)

    def curvature(self, layer: str, gradient: Tensor) -> float:
        """Return the mean over weights of v times the gradient, divided by the size of the step."""
        v = self._signs(layer, gradient)
        return float((v * gradient).mean()) / (abs(self._step) * self._scale[layer])

    def _signs(self, layer: str, like: Tensor) -> Tensor:
        return signs(self._seed, self._number[layer], like.numel()).view(like.shape).to(like.device)


class _Meter(LocalMeter):
    def __init__(self, streamed: StreamedModel, curvatures: dict[str, float]) -> None:
        super().__init__()
        self._streamed, self._curvatures = streamed, curvatures
        positive = [max(value, 0.0) for value in curvatures.values()]
        self._least = _LEAST * sum(positive) / max(len(positive), 1)

    def cost(self, block: LoadedBlock, change: Change) -> float:
        """Return half the mean curvature times the squared norm of the change, summed over layers."""
        prefix, total = self._streamed.block_name(block.index), 0.0
        for path, W in change.weights.items():
            curvature = max(self._curvatures[f"{prefix}.{path}"], self._least)
            total += 0.5 * curvature * float((W - change.floats[path]).square().sum())
        return total
