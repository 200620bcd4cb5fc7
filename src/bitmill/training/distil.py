"""The loop of an end-to-end training: Adam on the scales, codebooks and norms of a quantized model.

Every quarter of an epoch the loss is measured on windows that were kept out of training. The model computes with
the stored form of its parameters at all times, so these are the losses of the folder that would be written; the
best state is kept, the start included.

Sources: EfficientQAT (Chen et al. 2024, arXiv 2407.11062), section 3.3, whose scales learn from the next token;
AQLM (Egiazarian et al. 2024, arXiv 2401.06118) and mlx-lm's DWQ, whose scales learn from the float model's logits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from bitmill.errors import NumericsError
from bitmill.evaluation.logits import DeferredLogits
from bitmill.evaluation.metrics import LanguageModelMetrics
from bitmill.progress import Progress
from bitmill.training.loss import cross_entropy, kl_divergence, positions_at_a_time
from bitmill.training.options import TrainingOptions
from bitmill.training.snapshot import Snapshots, TrainingResult, restore_snapshot, take_snapshot
from bitmill.training.student import Student
from bitmill.tuners.training import adam, adam_step

CHECKS = 4  # an epoch
_WARM_UP = 0.05  # share of the steps in which the rate rises
TRAINING = "train"  # name of the task in the progress

KEPT = ("kl_divergence", "perplexity", "top1_agreement")  # figures of the held-apart windows in the report


@dataclass(frozen=True)
class WindowSet:
    """Windows of tokens, and the teacher's outputs for them.

    windows: (n, length) token ids.
    expected: of every window, (1, length, vocabulary); empty without a teacher.
    """

    windows: Tensor
    expected: Sequence[DeferredLogits] = ()


class Training:
    """Training of a student.

    Args:
        student: the quantized model.
        data: windows to train on.
        held_apart: windows that choose the state.
        options: how.
        seed: of the order of the windows.
        progress: where progress is reported.
        snapshots: keeps the state at every check, and may hold that of an earlier run, which is continued.
    """

    def __init__(
        self,
        student: Student,
        data: WindowSet,
        held_apart: WindowSet,
        options: TrainingOptions,
        seed: int = 0,
        progress: Progress | None = None,
        snapshots: Snapshots | None = None,
    ) -> None:
        self.student, self.data, self.held_apart, self.options = student, data, held_apart, options
        self.progress, self.snapshots = progress or Progress(), snapshots
        generator = torch.Generator().manual_seed(seed)
        count = len(data.windows)
        self._orders = [torch.randperm(count, generator=generator).tolist() for _ in range(options.epochs)]
        self._windows_a_step = max(1, options.tokens // data.windows.shape[1])
        self._steps_an_epoch = -(-len(data.windows) // self._windows_a_step)
        self._total = self._steps_an_epoch * options.epochs
        self._began = time.monotonic()
        self._losses: list[float] = []  # of the steps since the last check

    def run(self) -> TrainingResult:
        """Train; returns the best state on the held-apart windows, the start where nothing is better.

        Raises:
            NumericsError: the loss is NaN or infinite before anything is better than the start.
        """
        optimizer = adam((self.student.leaves(), self.options.rate))
        result = self._begin(optimizer)
        self.progress.start(TRAINING, self._total)
        self.progress.advance(result.steps)
        for step in range(result.steps, self._total):
            share = self._share(step)
            if share <= 0:
                break
            loss = self._backward(self._batch(step))
            if not math.isfinite(loss):
                return self._diverged(result, step, loss)
            adam_step(optimizer, share)
            self._losses.append(loss)
            result.steps = step + 1
            self.progress.describe(f"loss {loss:.4g}, rate {self.options.rate * share:.2g}")
            self.progress.advance()
            if self._is_check(step + 1):
                if not self._check(result, share):
                    return self._diverged(result, step, math.nan)
                self._save(result, optimizer)
        if result.steps != result.curve[-1]["step"]:
            self._check(result, 0.0)
        self.progress.finish()
        return result

    def _begin(self, optimizer: torch.optim.Adam) -> TrainingResult:
        """Return the result so far: that of an earlier run, or the start."""
        earlier = self.snapshots.load() if self.snapshots else None
        if earlier is not None:
            tensors, data = earlier
            self._began -= data["elapsed_s"]
            return restore_snapshot(tensors, data, self.student.learned, optimizer)
        start = self.measure()
        if not math.isfinite(self._loss(start)):
            raise NumericsError("The loss of the folder is NaN or infinite before training; quantize it again.")
        result = TrainingResult(self.student.state(), start, start)
        result.curve.append({"step": 0, "epoch": 0.0, "loss": self._loss(start)})
        return result

    def _save(self, result: TrainingResult, optimizer: torch.optim.Adam) -> None:
        if self.snapshots is not None:
            tensors, data = take_snapshot(result, self.student.learned, optimizer)
            self.snapshots.save(tensors, {**data, "elapsed_s": time.monotonic() - self._began})

    def _batch(self, step: int) -> list[int]:
        """Return the windows of a step."""
        epoch, within = divmod(step, self._steps_an_epoch)
        return self._orders[epoch][within * self._windows_a_step :][: self._windows_a_step]

    @torch.no_grad()
    def measure(self) -> dict[str, Any]:
        """Return perplexity and, with a teacher, KL divergence and agreement on the held-apart windows."""
        metrics = LanguageModelMetrics()
        for window, reference in zip_longest(self.held_apart.windows, self.held_apart.expected):
            metrics.add(window[None], self.student.split(window[None]), reference)
        try:
            figures = metrics.result()
        except NumericsError:
            return {"perplexity": math.nan}
        return {key: figures[key] for key in KEPT if figures.get(key) is not None}

    def _loss(self, figures: dict[str, Any]) -> float:
        if self.options.loss == "kl":
            return float(figures.get("kl_divergence", math.nan))
        return math.log(figures["perplexity"])

    def _backward(self, batch: Sequence[int]) -> float:
        """Add the gradients of some windows; returns their mean loss for each token."""
        total = self.data.windows[list(batch)].numel()
        return sum(self._backward_window(index, total) for index in batch)

    def _backward_window(self, index: int, total: int) -> float:
        """Add the gradient of the loss of one window, divided by `total`; returns that share of the loss."""
        window, split = self.data.windows[index], self.student.split
        with torch.enable_grad():
            hidden = split.hidden_states(window[None])
            leaf = hidden.detach().requires_grad_()
            logits = split.logits(leaf)
        loss = 0.0
        for positions in positions_at_a_time(len(window), self.student.vocabulary):
            with torch.enable_grad():
                piece = logits[0, positions]
            with torch.no_grad():
                value, gradient = self._piece_loss(index, positions, piece.detach())
            loss += float(value) / total
            piece.backward(gradient.div_(total).to(piece.dtype))
        hidden.backward(leaf.grad)
        return loss

    def _piece_loss(self, index: int, positions: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        if self.options.loss == "kl":
            return kl_divergence(logits, self.data.expected[index][0, positions])
        following = self.data.windows[index][positions.start + 1 : positions.stop + 1]
        return cross_entropy(logits, following.to(logits.device))

    def _share(self, step: int) -> float:
        """Return the share of the rate at a step: it rises in the first ones, then falls to 0 at the end."""
        done = step / self._total
        if self.options.max_minutes is not None:
            done = max(done, (time.monotonic() - self._began) / (60 * self.options.max_minutes))
        return min(1 - done, (step + 1) / max(1.0, _WARM_UP * self._total))

    def _is_check(self, steps: int) -> bool:
        """Return True after every quarter of an epoch."""
        within = (steps - 1) % self._steps_an_epoch + 1
        return within * CHECKS // self._steps_an_epoch > (within - 1) * CHECKS // self._steps_an_epoch

    def _check(self, result: TrainingResult, share: float) -> bool:
        """Measure the present state and keep it where it is the best; False where its loss is not finite."""
        figures = self.measure()
        loss = self._loss(figures)
        if not math.isfinite(loss):
            return False
        result.curve.append(
            {
                "step": result.steps,
                "epoch": result.steps / self._steps_an_epoch,
                "rate": self.options.rate * share,
                "training_loss": sum(self._losses) / len(self._losses),
                "loss": loss,
            }
        )
        self._losses.clear()
        if loss < self._loss(result.best):
            result.best, result.best_step, result.state = figures, result.steps, self.student.state()
        return True

    def _diverged(self, result: TrainingResult, step: int, loss: float) -> TrainingResult:
        """Return the best state so far. Raises NumericsError where that is the start."""
        self.progress.finish()
        result.stopped = (
            f"The loss became {loss} in step {step + 1} of {self._total} at rate {self.options.rate:g}; "
            "use a lower --rate (rate)."
        )
        if result.best_step == 0:
            raise NumericsError(result.stopped)
        self.progress.note(f"{result.stopped} The state after step {result.best_step} is kept.")
        return result
