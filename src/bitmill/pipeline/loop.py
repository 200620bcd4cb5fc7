"""The loop: load a block, let the recipe quantize it stage by stage, hand it to the sink, feed the next.

Nothing here knows an architecture (adapters do), a method (recipes do) or a file layout (sinks do).
Later blocks are calibrated on the outputs of earlier ones *as stored*, that is of the decoded codes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bitmill.errors import RecipeError
from bitmill.models.calls import Call
from bitmill.models.memory import give_back
from bitmill.models.skeleton import Skeleton
from bitmill.numerics.gram import RunningGram
from bitmill.pipeline.calibration import StagedForward, stages_of
from bitmill.pipeline.fold import fold_transforms
from bitmill.pipeline.measure import Measure
from bitmill.progress import Progress
from bitmill.quantized import Quantized
from bitmill.recipe import Recipe
from bitmill.solvers import Statistics
from bitmill.solvers.base import output_error

# Windows are batched up to this many tokens: enough for large products, little enough for small memory.
_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Job:
    """What is to be done: the model, the recipe, tokens (windows, length) to calibrate and to measure on."""

    skeleton: Skeleton
    recipe: Recipe
    calibration: Tensor | None = None
    held_out: Tensor | None = None


@dataclass(frozen=True)
class LayerResult:
    """One quantized layer and what is known about it."""

    quantized: Quantized
    weight_error: float  # relative squared error of the weights
    output_error: float | None  # relative squared error of the outputs on the calibration text

    def summary(self) -> dict[str, Any]:
        """The layer as plain data, for the report."""
        quantized = self.quantized
        return {
            "format": quantized.format.name,
            "shape": list(quantized.shape),
            "bits_per_weight": quantized.bits_per_weight,
            "size_bytes": quantized.format.stored_bits(quantized.shape) // 8,
            "weight_error": self.weight_error,
            "output_error": self.output_error,
        }


@dataclass
class BlockResult:
    """One finished block: quantized layers by full name, and float tensors that a transform changed."""

    index: int
    layers: dict[str, LayerResult] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)


class Sink(Protocol):
    """Where finished blocks go; it also says which ones it already holds."""

    def finished(self, index: int) -> BlockResult | None:
        """A block finished earlier, so that the loop can go on from it; None to quantize it now."""

    def write(self, result: BlockResult, skeleton: Skeleton) -> None:
        """Keep a finished block."""


@torch.no_grad()
def run(job: Job, sink: Sink, progress: Progress | None = None) -> dict[str, float | int]:
    """Quantize every block. Returns the measured quality on the held-out windows (empty without them)."""
    progress = progress or Progress()
    skeleton, recipe = job.skeleton, job.recipe
    calibrates = recipe.needs == "gram"
    if calibrates and job.calibration is None:
        raise RecipeError(f"The recipe {recipe.name!r} needs calibration text; give it some with --calib.")
    hidden: list[Tensor] = []
    calls: list[list[Call]] = []
    measure = None
    with skeleton.outside("before"):
        if calibrates:
            assert job.calibration is not None
            for batch in job.calibration.split(max(1, _BATCH_TOKENS // job.calibration.shape[1])):
                start, block_calls = skeleton.enter(batch)
                hidden.append(start)
                calls.append(block_calls)
        if job.held_out is not None:
            measure = Measure(skeleton, job.held_out)

    progress.start("quantize", len(skeleton.blocks))
    for index in range(len(skeleton.blocks)):
        block = skeleton.load_block(index)
        if measure:
            measure.pass_float(block, index)
        here = [c[index] for c in calls]
        done = sink.finished(index)
        if done is not None:
            _restore(done, skeleton)
            hidden = [call.run(block, h) for call, h in zip(here, hidden)]
        else:
            result = BlockResult(index, changed=fold_transforms(recipe, skeleton, index))
            hidden = _quantize_block(block, result, job, hidden, here)
            sink.write(result, skeleton)
        if measure:
            measure.pass_quantized(block, index)
        skeleton.free_block(index)
        progress.advance()
    progress.finish()
    if measure is None:
        return {}
    with skeleton.outside("after"):
        return measure.result()


def _quantize_block(
    block: nn.Module, result: BlockResult, job: Job, hidden: list[Tensor], calls: list[Call]
) -> list[Tensor]:
    """Quantize the linears of one block in place; returns its outputs (none for a data-free recipe)."""
    prefix = job.skeleton.block_name(result.index)
    if not calls:
        for name in job.skeleton.adapter.linears:
            _solve_stage(block, [name], prefix, Statistics(), job, result)
        return []
    stages = stages_of(job.skeleton.adapter, block, hidden[0][:1], _first_window(calls[0]))
    forward = StagedForward(block, hidden, calls, [stage[0] for stage in stages])
    try:
        for stage in stages:
            stats = _statistics(forward, stage[0], _matrix(block, stage[0], job).shape[1], job)
            _solve_stage(block, stage, prefix, stats, job, result)
        return forward.outputs()
    finally:
        forward.close()


def _statistics(forward: StagedForward, lead: str, width: int, job: Job) -> Statistics:
    """What a stage's inputs say about its linears."""
    gram = RunningGram(width, job.skeleton.device)
    for X in forward.inputs(lead):
        gram.add(X)
    return Statistics(gram.mean(), gram.tokens)


def _solve_stage(
    block: nn.Module, stage: list[str], prefix: str, stats: Statistics, job: Job, result: BlockResult
) -> None:
    """Quantize the linears that read one input; they are solved as one tall matrix where rows are apart."""
    names = [name for name in stage if not job.recipe.ignores(f"{prefix}.{name}")]
    matrices = [_matrix(block, name, job) for name in names]
    format, solver = job.recipe.weight, job.recipe.solver
    if format.group_size == "tensor" or len(names) < 2:
        solved = [solver.solve(W, stats, format) for W in matrices]
    else:
        solved = solver.solve(torch.cat(matrices), stats, format).split([W.shape[0] for W in matrices])
    for name, W, quantized in zip(names, matrices, solved):
        decoded = quantized.dequantize()
        result.layers[f"{prefix}.{name}"] = LayerResult(
            quantized,
            output_error(W, decoded, None),
            None if stats.gram is None else output_error(W, decoded, stats.gram),
        )
        _put(block, name, decoded, job.skeleton)
    give_back()  # splinters of one stage must not add to the next one's peak


def _restore(done: BlockResult, skeleton: Skeleton) -> None:
    """Bring a block to the state in which it was finished."""
    for name, tensor in done.changed.items():
        if skeleton.is_parameter(name):
            skeleton.set(name, tensor.to(skeleton.device, torch.float32))
    block = skeleton.blocks[done.index]
    prefix = skeleton.block_name(done.index) + "."
    for name, layer in done.layers.items():
        _put(block, name.removeprefix(prefix), layer.quantized.dequantize(), skeleton)


def _matrix(block: nn.Module, name: str, job: Job) -> Tensor:
    """The weight of a linear as (out, in), fp32."""
    weight = block.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.T.contiguous() if job.skeleton.adapter.transposed else weight.data


def _put(block: nn.Module, name: str, W: Tensor, skeleton: Skeleton) -> None:
    """Replace the weight of a linear by W (out, in)."""
    weight = block.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    weight.data = (W.T if skeleton.adapter.transposed else W).to(skeleton.device).contiguous()


def _first_window(call: Call) -> Call:
    """The same call for a batch of one window."""

    def cut(value: object) -> object:
        if isinstance(value, Tensor):
            return value[:1] if value.dim() > 1 and value.shape[0] > 1 else value
        if isinstance(value, tuple):
            return tuple(cut(v) for v in value)
        return value

    return Call(tuple(cut(a) for a in call.args), {k: cut(v) for k, v in call.kwargs.items()})
