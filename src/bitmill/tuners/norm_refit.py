"""Norm refit: the scales of a norm by least squares, for the quantized layers that read it.

    error(s) = sum_l E |Q_l (s * x) - W_l x|^2         x: input of the layers l, the output of the norm
    (G o sum_l Q_l^T Q_l + lambda I) s = diag(G sum_l W_l^T Q_l) + lambda 1          G = E x x^T

One small linear system a norm, no gradients. A norm is left unchanged where the block's error would not fall.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitmill.architectures.adapter import Seam
from bitmill.errors import RecipeError
from bitmill.numerics.statistics import GRAM
from bitmill.tuners.base import TARGETS, TUNERS, BlockTask, Tuner


@TUNERS.register("norm_refit")
@dataclass(frozen=True)
class NormRefit(Tuner):
    """Refit norms to the quantized layers behind them.

    damp: lambda as a share of the system's mean diagonal; it pulls the scales towards 1.
    """

    damp: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.damp < float("inf"):
            raise RecipeError(f"damp of norm_refit is {self.damp!r}; use a number above 0.")

    @property
    def needs(self) -> frozenset[str]:
        """The Gram matrices of the layers' inputs, and the float block's outputs."""
        return GRAM | TARGETS

    def after(self, task: BlockTask) -> None:
        """Refit every norm that the architecture's seams name."""
        best = task.error()
        for seam in task.seams:
            readers = [name for name in seam.targets if name in task.quantized]
            if seam.kind != "norm" or not readers:
                continue
            scale = self._scale(task, seam, readers[0])
            norm = task.block.get_submodule(seam.source)
            before = {f"{seam.source}.{leaf}": p.data for leaf, p in norm.named_parameters(recurse=False)}
            for name, values in before.items():
                shift = 1.0 if seam.norm_plus_one and name.endswith("weight") else 0.0
                task.set_float(name, (values + shift) * scale - shift)
            error = task.error()
            if error < best:
                best = error
                continue
            for name, values in before.items():
                task.set_float(name, values)

    def _scale(self, task: BlockTask, seam: Seam, reader: str) -> Tensor:
        """Return s (channels,) of least squared error."""
        gram = task.stats[reader].gram
        assert gram is not None
        gram = gram.double()
        power, match = torch.zeros_like(gram), torch.zeros_like(gram)
        for name in seam.targets:
            Q = task.matrix(name).double()
            power.addmm_(Q.T, Q)
            match.addmm_(task.originals.get(name, task.matrix(name)).double().T, Q)
        system = gram * power
        ridge = self.damp * system.diagonal().mean().clamp(min=1e-30)
        system.diagonal().add_(ridge)
        right_side = (gram * match).sum(0) + ridge  # diag(G M) for a symmetric G
        return torch.linalg.solve(system, right_side).float()
