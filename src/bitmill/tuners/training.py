"""Shared parts of gradient-based tuners: minibatches of windows, parameters in units of their own size, Adam."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from bitmill.formats.part import Part
from bitmill.formats.quantized import Quantized
from bitmill.models.block_call import BlockCall
from bitmill.tuners.base import BlockTask, relative_error


@dataclass(frozen=True)
class Minibatch:
    """Some windows: arguments of the block for them, inputs, and targets."""

    call: BlockCall
    hidden: Tensor  # (windows, tokens, width)
    target: Tensor
    gradients: Tensor | None = None  # of the loss by the block's outputs, (draws, windows, tokens, width)


def minibatches(task: BlockTask, tokens: int, generator: torch.Generator) -> Iterator[Minibatch]:
    """Yield every window once, in random order.

    Args:
        tokens: about so many in a minibatch, and never more than one batch of the task.
        generator: of the order.
    """
    cuts = []
    for batch, hidden in enumerate(task.inputs):
        step = max(1, tokens // hidden.shape[1])
        cuts += [(batch, start, start + step) for start in range(0, hidden.shape[0], step)]
    for k in torch.randperm(len(cuts), generator=generator).tolist():
        yield minibatch(task, *cuts[k])


def minibatch(task: BlockTask, batch: int, start: int, stop: int) -> Minibatch:
    """Return the windows from `start` up to `stop` of a batch."""
    hidden = task.inputs[batch]
    call = task.calls[batch].cut(hidden.shape[0], start, stop)
    gradients = task.output_gradients[batch][:, start:stop] if task.output_gradients else None
    return Minibatch(call, hidden[start:stop], task.targets[batch][start:stop], gradients)


class ScaledParameter:
    """A learned tensor in units of its size, so that one learning rate suits all of them.

    The unit is the root mean square of a row of parameters, or of a whole vector.
    """

    def __init__(self, start: Tensor) -> None:
        self.start = start
        axes = tuple(range(1 if start.dim() > 1 else 0, start.dim()))
        self.unit = start.square().mean(axes, keepdim=True).sqrt()
        self.steps = torch.zeros_like(start, requires_grad=True)

    def value(self) -> Tensor:
        """Return the present tensor, with its gradient."""
        return torch.addcmul(self.start, self.unit, self.steps)


class TrainableParameters:
    """The parameters that a tuner trains in a quantized block: those of quantized layers, norms and biases.

    params: train the continuous parts of every quantized layer.  norms: train the vectors that stay in float.
    """

    def __init__(self, task: BlockTask, params: bool, norms: bool) -> None:
        self.task = task
        self.params: dict[str, dict[str, ScaledParameter]] = {}
        for name, quantized in task.quantized.items() if params else ():
            known = quantized.params
            self.params[name] = {
                part.name: ScaledParameter(known[part.name]) for part in continuous_parts(quantized)
            }
        vectors = [(name, p) for name, p in task.floats() if p.dim() == 1] if norms else []
        self.floats = {name: ScaledParameter(parameter.data) for name, parameter in vectors}

    def leaves(self) -> list[ScaledParameter]:
        """Return all learned tensors."""
        return [leaf for parts in self.params.values() for leaf in parts.values()] + list(self.floats.values())

    def tensors(self) -> dict[str, Tensor]:
        """Return the block's weights and vectors with their gradients, by name."""
        tensors = {name: leaf.value() for name, leaf in self.floats.items()}
        for name, parts in self.params.items():
            quantized = self.task.quantized[name]
            params = {**quantized.params, **{part: leaf.value() for part, leaf in parts.items()}}
            W = quantized.format.dequantize(quantized.codes, params, quantized.shape)
            tensors[f"{name}.weight"] = W.T if self.task.transposed else W
        return tensors

    @torch.no_grad()
    def store(self) -> None:
        """Let the block compute with the stored form of the present state."""
        for name, leaf in self.floats.items():
            self.task.set_float(name, leaf.value())
        for name, parts in self.params.items():
            quantized, params = self.task.quantized[name], dict(self.task.quantized[name].params)
            for part in continuous_parts(quantized):
                params[part.name] = part.unpack(part.pack(parts[part.name].value()))
            self.task.set_quantized(name, replace(quantized, params=params))

    def state(self) -> list[Tensor]:
        """Return a copy of the present state."""
        return [leaf.steps.detach().clone() for leaf in self.leaves()]

    def restore(self, state: list[Tensor]) -> None:
        """Return to a `state`."""
        for leaf, steps in zip(self.leaves(), state):
            leaf.steps.data.copy_(steps)  # training goes on in place, and must not reach the state
        self.store()


def adam(*groups: tuple[list[Tensor], float]) -> torch.optim.Adam:
    """Return Adam (Kingma and Ba 2015, arXiv 1412.6980) for groups of leaves with a learning rate each.

    Args:
        groups: leaves and their initial learning rate; empty groups are left out.
    """
    filled = [{"params": leaves, "lr": rate, "initial_lr": rate} for leaves, rate in groups if leaves]
    return torch.optim.Adam(filled, betas=(0.9, 0.95), eps=1e-12, foreach=False)


def adam_step(optimizer: torch.optim.Adam, share: float = 1.0) -> None:
    """Move every leaf by about its learning rate, and clear its gradient.

    Args:
        share: of the initial learning rates.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * share
    optimizer.step()
    optimizer.zero_grad()


class LearnedCodes(Protocol):
    """A matrix while its codes are learned."""

    def __call__(self) -> Tensor:
        """Return the matrix (out, in), fp32, with gradients."""
        ...

    def quantized(self) -> Quantized:
        """Return the matrix as it would be stored."""
        ...


BlockLoss = Callable[[Minibatch, Tensor], Tensor]  # outputs of a block -> losses, (windows, ...)


def plain_loss(batch: Minibatch, output: Tensor) -> Tensor:
    """Return the relative error of every token, (windows, tokens)."""
    return relative_error(output, batch.target)


@torch.no_grad()
def mean_loss(task: BlockTask, loss: BlockLoss) -> float:
    """Return the mean loss of a block with its present weights over all windows."""
    total = count = 0.0
    for number, hidden in enumerate(task.inputs):
        losses = loss(minibatch(task, number, 0, hidden.shape[0]), task.run(number))
        total, count = total + float(losses.sum()), count + losses.numel()
    return total / max(count, 1)


@dataclass(frozen=True)
class Schedule:
    """How long a block is trained.

    steps: of the optimizer; 0 for the number that `epochs` take.
    epochs: passes over the calibration windows, where `steps` is 0.
    tokens: in a step.
    seed: of the order of the windows.
    seconds: of a clock, after which training ends; rates follow the larger share of time and steps.
    """

    epochs: int = 1
    tokens: int = 512
    seed: int = 0
    steps: int = 0
    seconds: float = math.inf


def learn_codes(
    task: BlockTask,
    matrices: Mapping[str, LearnedCodes],
    optimizer: torch.optim.Adam,
    schedule: Schedule,
    before_step: Callable[[float], None] = lambda done: None,
    loss: BlockLoss = plain_loss,
    penalty: Callable[[], Tensor] | None = None,
) -> None:
    """Train the codes of a quantized block towards the float block's outputs.

    The block is measured in its stored form after every epoch, or eight times with `steps`, and left in the best
    of these states, the start included. The learning rate falls to a twentieth along a cosine.

    Args:
        task: the block, quantized.
        matrices: path of a linear -> its matrix.
        optimizer: of their leaves.
        schedule: how long.
        before_step: called with the share of the training that is done.
        loss: what falls; a state of larger plain loss than the start's is not kept either.
        penalty: added to the loss, in units of its value at the start.
    """
    first = plain = task.error()
    start = best = first if loss is plain_loss else mean_loss(task, loss)
    kept = dict(task.quantized)
    if start == 0 or not matrices:
        return
    for done, batch, measure in _steps(task, schedule):
        if batch is not None:
            before_step(done)
            with torch.enable_grad():
                rounded = ((name, matrix()) for name, matrix in matrices.items())
                weights = {f"{name}.weight": W.T if task.transposed else W for name, W in rounded}
                output = batch.call.run_with(weights, task.block, batch.hidden)
                value = loss(batch, output).mean() / start
                (value if penalty is None else value + penalty()).backward()
            adam_step(optimizer, _cosine(done))
        if measure:
            for name, matrix in matrices.items():
                task.set_quantized(name, matrix.quantized())
            plain = task.error()
            error = plain if loss is plain_loss else mean_loss(task, loss)
            if error < best and plain <= first:
                best, kept = error, dict(task.quantized)
            elif not math.isfinite(error):
                break
    for name, quantized in kept.items():
        task.set_quantized(name, quantized)


_CHECKS = 8  # times that a training of a given number of steps is measured


def _steps(task: BlockTask, schedule: Schedule) -> Iterator[tuple[float, Minibatch | None, bool]]:
    """Yield the share that is done, a minibatch, and if the block is to be measured after it.

    Where time ends, a last measurement comes without a minibatch.
    """
    generator, began = torch.Generator().manual_seed(schedule.seed), time.monotonic()
    batches = list(minibatches(task, schedule.tokens, generator))
    total = schedule.steps or schedule.epochs * len(batches)
    every = max(1, schedule.steps // _CHECKS) if schedule.steps else len(batches)
    for step in range(total):
        share = (time.monotonic() - began) / schedule.seconds
        if share >= 1:
            yield 1.0, None, True
            return
        if step and step % len(batches) == 0:
            batches = list(minibatches(task, schedule.tokens, generator))
        last = step + 1 == total
        yield max(step / total, share), batches[step % len(batches)], last or (step + 1) % every == 0


def _cosine(done: float) -> float:
    """Return the share of the learning rate: 1 at the start, a twentieth at the end."""
    return 0.05 + 0.475 * (1 + math.cos(math.pi * done))


def rms_rate(leaf: Tensor, rate: float) -> float:
    """Return a learning rate in units of the root mean square of a leaf."""
    return rate * max(float(leaf.detach().square().mean().sqrt()), 1e-8)


def continuous_parts(quantized: Quantized, shared: bool = False) -> list[Part]:
    """Return the stored parameters that are numbers, not indices, which a gradient can move.

    Args:
        quantized: the matrix.
        shared: also those shared with other layers, whose effect on other blocks is unknown to a block alone.
    """
    format = quantized.format
    parts = (part for part in format.parts(quantized.shape) if shared or part.name not in format.shared)
    return [part for part in parts if part.bits is None and part.stored_as.is_floating_point]
