"""Quantize one block: collect statistics, fold transforms, tune, solve stage by stage, tune, and feed the next."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from bitmill.architectures.attention import round_attention
from bitmill.architectures.experts import expert_of
from bitmill.architectures.inputs import hook_inputs
from bitmill.calibration.collect import collect_expert_averages, collect_statistics, find_stages
from bitmill.calibration.experts import shrink, shrink_all
from bitmill.calibration.fisher import rescale_fisher
from bitmill.calibration.repeated_forward import Forward, stage_forward
from bitmill.calibration.store import StoredBlock
from bitmill.calibration.streams import Streams
from bitmill.formats import Format, Params
from bitmill.formats.quantized import shared_module_path
from bitmill.models.meta import trim_malloc
from bitmill.numerics.gram import RunningGram
from bitmill.numerics.statistics import Statistics
from bitmill.pipeline.fold import fold_transforms
from bitmill.pipeline.inputs import BlockInputs, compares_inputs, read_stored, uses_statistics
from bitmill.pipeline.job import BlockResult, Job, LayerResult
from bitmill.pipeline.ranges import check_range, to_stored
from bitmill.solvers import Solver
from bitmill.solvers.base import output_error, solve_stacked
from bitmill.tuners import BlockTask

SAMPLES = 1024  # tokens of every input that are kept where a format searches its scale of inputs


def quantize_block(job: Job, module: nn.Module, index: int, inputs: BlockInputs) -> BlockResult:
    """Quantize the linears of one block in place, and move the calibration windows past it.

    Args:
        job: the model, the scheme of every layer, and the data.
        module: the block, with float weights.
        index: its index.
        inputs: data that all blocks are quantized with.
    """
    streams, tuners = inputs.streams, job.recipe.tuners
    stored = read_stored(job, inputs.store, index)
    stages = _stages(job, module, index, streams, stored)
    float_outputs = streams.float_outputs(module, index) if streams and not _compares_once(job) else []
    stats = _input_statistics(job, module, index, stages, streams, stored)
    if inputs.store and not stored and uses_statistics(job):
        inputs.store.save(index, stats, stages, job.streamed.note_hidden_states(*float_outputs))
    block = _Block(job, _block_task(job, module, index, stages, stats, streams, float_outputs), inputs.shared)
    result = BlockResult(index, changed=block.fold(inputs))
    for name in block.task.names:
        check_range(block.layer(name), block.task.matrix(name), block.task.formats[name])
    # a float copy in the basis of the block that is quantized
    float_module = copy.deepcopy(module) if compares_inputs(job) else None
    if job.recipe.attention:
        round_attention(module, job.recipe.attention.roundings(index))
    before = {name: parameter.detach().clone() for name, parameter in block.task.floats()} if tuners else {}
    if tuners:
        block.task.round_inputs()
        if inputs.gradients:
            block.task.output_gradients = inputs.gradients.block(index, block.task.inputs)
    for tuner in tuners:
        tuner.before(block.task)
    outputs = block.solve(streams, float_module)
    for tuner in tuners:
        tuner.after(block.task)
    result.changed |= block.round_changed_floats(before)
    result.layers = block.layer_results()
    if streams:  # tuners change the outputs
        float_outputs = float_outputs or block.float_outputs
        streams.advance(module, index, float_outputs, None if tuners else outputs, job.propagate == "float")
    return result


def _compares_once(job: Job) -> bool:
    """Return True if the pass that compares inputs yields the float block's outputs too, which saves a pass.

    It runs a float copy with folded transforms, whose outputs differ by rounding; tuners need the outputs before.
    """
    return compares_inputs(job) and not (
        job.recipe.tuners or any(scheme.transforms for scheme in job.resolved.used_schemes)
    )


def _stages(
    job: Job, module: nn.Module, index: int, streams: Streams | None, stored: StoredBlock | None
) -> list[list[str]]:
    """Return the linears of a block in the order in which they run; those that read one input share a list."""
    adapter = job.streamed.adapter
    if streams:
        return find_stages(adapter, module, *streams.first_window(index), job.kept(index))
    if stored and stored.stages:  # statistics are named after the first linear of each stage
        return stored.stages
    return [list(stage) for stage in adapter.stages]


def _input_statistics(
    job: Job,
    module: nn.Module,
    index: int,
    stages: list[list[str]],
    streams: Streams | None,
    stored: StoredBlock | None,
) -> dict[str, Statistics]:
    """Return statistics of the block's inputs before it is quantized, by the first linear of each stage.

    Empty where stages collect them one after another, or the recipe needs none.
    """
    all_stages = job.propagate == "float" and uses_statistics(job)
    if not all_stages and "activations" not in job.needs:
        return {}
    if stored:
        return stored.stats
    assert streams is not None
    leads = [stage[0] for stage in stages]
    keeps = SAMPLES if "samples" in job.needs else 0
    return shrink_all(collect_statistics(module, streams.hidden.batches, streams.calls(index), leads, keeps))


def _block_task(
    job: Job,
    module: nn.Module,
    index: int,
    stages: list[list[str]],
    stats: dict[str, Statistics],
    streams: Streams | None,
    float_outputs: list[Tensor],
) -> BlockTask:
    """Return the block as tuners see it."""
    streamed, tuners = job.streamed, job.recipe.tuners
    prefix = streamed.block_name(index)
    names = [name for stage in stages for name in stage if job.quantizes(f"{prefix}.{name}")]
    task = BlockTask(
        block=module,
        names=names,
        formats={name: job.scheme(f"{prefix}.{name}").format for name in names},
        calls=streams.calls(index) if streams else [],
        inputs=list(streams.hidden.batches) if streams and tuners else [],  # otherwise freed as they pass
        targets=float_outputs,
        index=index,
        depth=len(streamed.blocks),
        transposed=streamed.adapter.transposed,
        seams=streamed.seams_inside(index),
        stages=stages,
        input_stats=stats,
    )
    if tuners:
        task.dtypes = {name: streamed.dtype(f"{prefix}.{name}") for name, _ in task.floats()}
    return task


@dataclass
class _Block:
    """A block while it is quantized.

    Attributes:
        job: the model, the scheme of every layer, and the data.
        task: the block as tuners see it, with the results so far.
        shared: path of a linear -> parts that its layers in all blocks share.
        fisher: path of a linear -> Fisher diagonal of its folded weight, where the recipe needs it.
        errors: path of a linear -> errors of its weights and outputs; with tuners they are computed in the end.
        float_outputs: outputs of the float copy where inputs were compared with it, batch by batch.
        expert_tokens: path of an expert -> number of calibration tokens that were sent to it.
    """

    job: Job
    task: BlockTask
    shared: dict[str, Params]
    fisher: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    float_outputs: list[Tensor] = field(default_factory=list)
    expert_tokens: dict[str, int] = field(default_factory=dict)

    @property
    def tuned(self) -> bool:
        """True if float weights and statistics are kept until tuners are done."""
        return bool(self.job.recipe.tuners)

    def layer(self, name: str) -> str:
        """Return the full name of a linear or parameter of the block."""
        return f"{self.job.streamed.block_name(self.task.index)}.{name}"

    def fold(self, inputs: BlockInputs) -> dict[str, Tensor]:
        """Fold transforms into the block, scale statistics accordingly, and return the changed float tensors."""
        task, index = self.task, self.task.index
        if inputs.fisher is None:
            return fold_transforms(self.job, index, task.input_stats)
        # a transform for the targets of a seam scales the rows of its source too, whatever the source's own scheme
        transformed = any(self.job.scheme(self.layer(name)).transforms for name in task.names)
        before = {name: task.matrix(name).clone() for name in task.names} if transformed else {}
        changed = fold_transforms(self.job, index, task.input_stats)
        self.fisher = inputs.fisher.block(index, self.job.streamed.device)
        for name, W in before.items():
            self.fisher[name] = rescale_fisher(self.fisher[name], W, task.matrix(name))
        return changed

    def solve(self, streams: Streams | None, float_module: nn.Module | None) -> list[Tensor] | None:
        """Solve every stage.

        Args:
            streams: hidden states before the block.
            float_module: float copy of the block, to compare inputs with.

        Returns:
            The outputs of the block, batch by batch, where the pass that collects statistics yields them.
        """
        job, task = self.job, self.task
        if job.propagate == "float" or not job.needs & {"gram", "cross"}:
            for stage in task.stages:
                self._solve_stage(stage, self._float_statistics(stage[0]))
            return None
        assert streams is not None
        leads = [stage[0] for stage in task.stages]
        batches = list(streams.hidden.batches) if self.tuned else streams.hidden.batches
        averages = collect_expert_averages(task.block, batches, task.calls, leads)
        staged = stage_forward(job.streamed.adapter.recurrent)
        with ExitStack() as stack:
            forward = staged(task.block, batches, task.calls, leads)
            stack.enter_context(forward)
            float_forward = None
            if float_module is not None:
                assert streams.float is not None
                float_batches = list(streams.float.batches)
                float_forward = staged(float_module, float_batches, streams.float.calls(task.index), leads)
                stack.enter_context(float_forward)
            for stage in task.stages:
                width = task.matrix(stage[0]).shape[1]
                gram = RunningGram(width, job.streamed.device, SAMPLES if "samples" in job.needs else 0)
                stats = _stage_statistics(forward, float_forward, stage[0], gram)
                if (expert := expert_of(stage[0])) and averages[expert[0]].gram is not None:
                    stats = shrink(stats, averages[expert[0]])
                self._solve_stage(stage, stats)
            if float_forward is not None and _compares_once(job):
                self.float_outputs = float_forward.outputs()
            return forward.outputs()

    def _float_statistics(self, lead: str) -> Statistics:
        """Return the statistics of a stage whose inputs are the float model's."""
        stats = self.task.input_stats.get(lead, Statistics())
        if stats.gram is not None and "cross" in self.job.needs:
            return replace(stats, cross=torch.zeros_like(stats.gram))
        return stats

    def _solve_stage(self, stage: list[str], stats: Statistics) -> None:
        """Quantize the linears that read one input, except those that a tuner has quantized."""
        task = self.task
        groups: dict[tuple[Format, Solver, frozenset[str]], list[str]] = {}
        for name in stage:
            if self.tuned:
                task.stats[name] = Statistics(stats.gram)
            if stats.gram is not None and expert_of(name):
                self.expert_tokens[name] = stats.tokens
            if name in task.names and name not in task.quantized:
                scheme = self.job.scheme(self.layer(name))
                groups.setdefault((scheme.format, scheme.solver, scheme.needs), []).append(name)
        for (format, solver, needs), names in groups.items():
            self._solve_group(names, stats, format, solver, needs)
        trim_malloc()  # fragments of one stage must not add to the next one's peak

    def _visible(self, stats: Statistics, names: list[str], needs: frozenset[str]) -> Statistics:
        """Return the statistics that linears of one scheme are solved with.

        With several schemes these are the ones that this scheme and the tuners need: statistics for other
        schemes must not change the codes.
        """
        if self.fisher:
            stats = replace(stats, fisher=torch.cat([self.fisher[name] for name in names]))
        if len(self.job.resolved.used_schemes) == 1:
            return stats
        return stats.restrict(needs.union(*(tuner.needs for tuner in self.job.recipe.tuners)))

    def _solve_group(
        self, names: list[str], stats: Statistics, format: Format, solver: Solver, needs: frozenset[str]
    ) -> None:
        """Quantize linears of one scheme that read one input."""
        task, visible = self.task, self._visible(stats, names, needs)
        matrices = [task.matrix(name) for name in names]
        shared = [self.shared.get(name) for name in names]
        for name, W, quantized in zip(names, matrices, solve_stacked(solver, matrices, visible, format, shared)):
            if self.tuned:
                task.set_quantized(name, quantized)
            else:
                decoded = quantized.dequantize()
                self.errors[name] = _errors(W, decoded, stats.gram)
                task.quantized[name] = quantized
                task.set_matrix(name, decoded)
                hook_inputs(task.block.get_submodule(name), quantized.rounding)

    def round_changed_floats(self, before: dict[str, Tensor]) -> dict[str, Tensor]:
        """Round the float parameters that tuners changed to their stored type, and return them by full name.

        Args:
            before: the parameters before the tuners ran, by path in the block.
        """
        streamed, changed = self.job.streamed, {}
        for name, parameter in self.task.floats():
            if name in before and not torch.equal(before[name], parameter):
                full = self.layer(name)
                changed[full] = to_stored(full, parameter.detach(), streamed.dtype(full))
                streamed.set_parameter(full, changed[full].float())
        return changed

    def layer_results(self) -> dict[str, LayerResult]:
        """Return every quantized layer with its errors, tuners included, by full name."""
        task, results = self.task, {}
        for name in task.names:
            quantized = task.quantized[name]
            if self.tuned:
                gram = task.stats.get(name, Statistics()).gram
                self.errors[name] = _errors(task.originals[name], quantized.dequantize(), gram)
            path = shared_module_path(name) if name in self.shared else ""
            results[self.layer(name)] = LayerResult(
                quantized, *self.errors[name], path, self.expert_tokens.get(name)
            )
        return results


def _stage_statistics(forward: Forward, float_forward: Forward | None, lead: str, gram: RunningGram) -> Statistics:
    """Advance a block to a stage and return the statistics of its input.

    Args:
        forward: passes through the block that is quantized.
        float_forward: passes through its float copy, to compare inputs with.
        lead: the first linear of the stage.
        gram: empty sums.
    """
    cross = None if float_forward is None else torch.zeros_like(gram.sum)
    if float_forward is None or expert_of(lead):
        for X in forward.inputs(lead):
            gram.add(X)
        for _ in float_forward.inputs(lead) if float_forward else ():
            pass  # tokens sent to this expert are others than those of the quantized model
        return Statistics(gram.mean(), gram.tokens, cross, max_abs=gram.max_abs, samples=gram.samples)
    assert cross is not None
    for X, X_float in zip(forward.inputs(lead), float_forward.inputs(lead)):
        gram.add(X)
        cross.addmm_((X_float - X).T, X)
    cross.div_(max(gram.tokens, 1))
    return Statistics(gram.mean(), gram.tokens, cross, max_abs=gram.max_abs, samples=gram.samples)


def _errors(W: Tensor, decoded: Tensor, gram: Tensor | None) -> tuple[float, float | None]:
    """Return the relative squared errors of a weight and, where the Gram matrix is available, of the outputs."""
    return output_error(W, decoded, None), None if gram is None else output_error(W, decoded, gram)
