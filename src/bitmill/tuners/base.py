"""The contract of a tuner: it learns parameters of a block before its linears are quantized, or after.

`before` may change float weights, or quantize layers itself (learned rounding); the solver takes the others.
`after` may change the parameters that stay in float (norms, biases) and the continuous ones of quantized layers.

Law (tests/conformance/test_tuners.py): the distance between the block's outputs and the float block's falls on
the inputs it was tuned on, and the measured parameters are exactly the stored ones.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from bitmill.architectures.adapter import Seam
from bitmill.architectures.inputs import hook_inputs
from bitmill.config.registry import Member, Registry
from bitmill.formats.base import Format
from bitmill.formats.quantized import Quantized
from bitmill.formats.scalar import RangeFormat
from bitmill.models.block_call import BlockCall
from bitmill.numerics.statistics import Statistics
from bitmill.solvers import Solver

TUNERS: Registry[type[Tuner]] = Registry("tuner", "bitmill.tuners")

TARGETS = frozenset({"targets"})  # what `needs` names when a tuner compares with the float model's block outputs
OUTPUT_GRADIENTS = frozenset({"output_gradients"})  # gradients of the model's loss by the block's outputs


@dataclass
class BlockTask:
    """One block during quantization: everything that a tuner may read and change.

    block: the module; its linears hold float weights first, decoded ones once they are quantized.
    names: the linears to be quantized, by path in the block, in the order in which they run.
    inputs: hidden states (windows, tokens, width), batch by batch, as produced by the quantized blocks before.
    targets: the float model's hidden states after this block, batch by batch; empty unless a tuner needs them.
    output_gradients: gradients of the float model's loss by these states, batch by batch, (draws, windows, tokens,
        width) up to a factor; empty unless a tuner needs them.
    dtypes: the types in which the parameters that stay in float will be stored.
    originals: the float weight (out, in) of every quantized linear, as it was when it was quantized.
    stats: statistics of every linear's inputs, where the recipe needs them; `gram` alone is kept.
    stages: the linears that read one input, together, in the order in which they run.
    input_stats: of the inputs of every stage, by its first linear, where the recipe needs "activations"; a tuner
        that
        changes the inputs of a linear updates them.
    """

    block: nn.Module
    names: list[str]
    formats: dict[str, Format]  # by path in the block, of the linears to be quantized
    calls: list[BlockCall]
    inputs: list[Tensor]
    targets: list[Tensor]
    index: int
    depth: int  # blocks of the model
    transposed: bool = False  # weights are stored (in, out)
    seams: tuple[Seam, ...] = ()
    quantized: dict[str, Quantized] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    originals: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Statistics] = field(default_factory=dict)
    stages: list[list[str]] = field(default_factory=list)
    input_stats: dict[str, Statistics] = field(default_factory=dict)
    output_gradients: list[Tensor] = field(default_factory=list)

    def range_format(self, name: str) -> RangeFormat:
        """Return the format of a linear's matrix, one whose grid is fixed by the range of each group."""
        format = self.formats[name].of_matrix
        assert isinstance(format, RangeFormat)
        return format

    def matrix(self, name: str) -> Tensor:
        """Return the weight of a linear as (out, in), fp32."""
        weight = self.block.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        return weight.data.T.contiguous() if self.transposed else weight.data

    def input_statistics(self, name: str) -> Statistics:
        """Return the calibration's statistics of a linear's input; empty where none were collected."""
        leads = (stage[0] for stage in self.stages if name in stage)
        return self.input_stats.get(next(leads, ""), Statistics())

    def set_matrix(self, name: str, W: Tensor) -> None:
        """Replace the weight of a linear.

        Args:
            name: path of the linear in the block.
            W: (out, in).
        """
        weight = self.block.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.data = (W.T if self.transposed else W).to(weight.device).contiguous()

    def set_quantized(self, name: str, quantized: Quantized) -> None:
        """Record a linear's result, and let the block compute with its stored form.

        Args:
            name: path of the linear in the block.
            quantized: its weight (out, in).
        """
        self.originals.setdefault(name, self.matrix(name))
        self.quantized[name] = quantized
        self.set_matrix(name, quantized.dequantize())
        hook_inputs(self.block.get_submodule(name), quantized.rounding)

    def round_inputs(self) -> None:
        """Let linears round their inputs before they are quantized, where scales come from the inputs alone."""
        for name, format in self.formats.items():
            if format.fits_inputs:
                hook_inputs(self.block.get_submodule(name), partial(format.effective_inputs, params={}))

    def as_stored(self, name: str, values: Tensor) -> Tensor:
        """Round values to the stored type of a parameter that stays in float.

        Args:
            name: of the parameter in the block.
            values: fp32.
        """
        return values.to(self.dtypes.get(name, values.dtype)).to(values.dtype)

    def set_float(self, name: str, values: Tensor) -> None:
        """Replace a parameter that stays in float, rounded to its stored type.

        Args:
            name: of the parameter in the block.
            values: fp32.
        """
        self.block.get_parameter(name).data = self.as_stored(name, values)

    def run(self, batch: int, tensors: dict[str, Tensor] | None = None) -> Tensor:
        """Return the block's output for one batch with its present weights.

        Args:
            batch: index of the batch.
            tensors: parameters that replace those of the block, by name.
        """
        return self.calls[batch].run_with(tensors or {}, self.block, self.inputs[batch])

    def floats(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters that stay in float: norms, biases, linears that are not quantized."""
        coded = {f"{name}.weight" for name in self.names}
        for name, parameter in self.block.named_parameters():
            if name not in coded:
                yield name, parameter

    @torch.no_grad()
    def error(self, tensors: dict[str, Tensor] | None = None) -> float:
        """Return the relative error of the block's outputs, a mean over tokens; `tensors` as in `run`."""
        total = sum(
            float(relative_error(self.run(i, tensors), target).sum()) for i, target in enumerate(self.targets)
        )
        return total / max(sum(target[..., 0].numel() for target in self.targets), 1)


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Return the squared distance of hidden states from their targets, relative to the targets' mean square.

    Every token has equal weight, as it has for the norms that read it. In absolute units, one attention sink with
    ten thousand times the energy of other tokens would dominate the loss.

    Args:
        output, target: (..., width).

    Returns:
        (...).
    """
    return (output - target).square().mean(-1) / mean_square(target)


def mean_square(hidden: Tensor) -> Tensor:
    """Return the mean square (...) of hidden states (..., width), bounded below so that it can be divided by."""
    return hidden.square().mean(-1).clamp(min=1e-30)


@dataclass(frozen=True)
class Tuner(Member, ABC):
    """Base of all tuners: a frozen dataclass of options."""

    registry: ClassVar[Registry[type[Tuner]]] = TUNERS

    @property
    def draws(self) -> int:
        """Gradients of the model's loss for each window, where `needs` names OUTPUT_GRADIENTS."""
        return 1

    @property
    def needs(self) -> frozenset[str]:
        """Statistics; TARGETS for a tuner that compares with the float model, OUTPUT_GRADIENTS with its loss."""
        return TARGETS

    @property
    def scales_channels(self) -> bool:
        """True for a tuner that scales channels at the seams."""
        return False

    def unsupported_reason(self, format: Format) -> str | None:
        """Return one sentence on why this tuner cannot work with this weight format; None where it can."""
        return None

    def unsupported_solver_reason(self, solver: Solver) -> str | None:
        """Return one sentence on why this solver would discard the results of `before`; None where it does not."""
        return None

    def before(self, task: BlockTask) -> None:
        """Act while the linears hold float weights."""

    def after(self, task: BlockTask) -> None:
        """Act once every linear is quantized."""
