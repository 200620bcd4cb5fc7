"""The state of an unfinished training as tensors and plain data, so that another process can go on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from bitmill.training.student import LearnedTensor

_MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam


@dataclass
class TrainingResult:
    """The best state of a training, and how it was reached.

    state: tensor of the folder -> its stored form.
    start, best: figures on the held-apart windows, of the start and of the best state.
    best_step: the step after which the best state was reached; 0 for the start.
    curve: of every check step, epoch, rate, training loss since the last one, and loss on the held-apart windows.
    steps: finished ones.
    stopped: why training ended early, as a sentence; "" where it did not.
    """

    state: dict[str, Tensor]
    start: dict[str, Any]
    best: dict[str, Any]
    best_step: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    stopped: str = ""


class Snapshots(Protocol):
    """Where a training keeps its state."""

    def save(self, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
        """Replace the state by a newer one."""
        ...

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the state of an earlier run, None where there is none."""
        ...


def take_snapshot(
    result: TrainingResult, learned: Mapping[str, LearnedTensor], optimizer: torch.optim.Adam
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of a training."""
    tensors = {f"best.{name}": tensor for name, tensor in result.state.items()}
    counts = {}
    for name, one in learned.items():
        steps = one.parameter.steps
        tensors[f"steps.{name}"] = steps.detach()
        if known := optimizer.state.get(steps):  # none without a gradient
            tensors |= {f"{moment}.{name}": known[moment] for moment in _MOMENTS}
            counts[name] = float(known["step"])
    plain = {key: value for key, value in vars(result).items() if key != "state"}
    return tensors, {**plain, "counts": counts}


def restore_snapshot(
    tensors: Mapping[str, Tensor],
    data: dict[str, Any],
    learned: Mapping[str, LearnedTensor],
    optimizer: torch.optim.Adam,
) -> TrainingResult:
    """Return to a state that `take_snapshot` returned."""
    for name, one in learned.items():
        steps = one.parameter.steps
        steps.data.copy_(tensors[f"steps.{name}"])
        if name in data["counts"]:
            moments = {moment: tensors[f"{moment}.{name}"].to(steps.device) for moment in _MOMENTS}
            optimizer.state[steps] = {"step": torch.tensor(data["counts"][name]), **moments}
    plain = {key: value for key, value in data.items() if key not in ("counts", "elapsed_s")}
    return TrainingResult({name: tensors[f"best.{name}"] for name in learned}, **plain)
