"""The contract of a tuner: what is learned in a block, before its linears are quantized or after.

`before` may change float weights, or settle layers itself (learned rounding); the solver takes what is left.
`after` may change what stays in float (norms, biases) and the continuous parameters of quantized layers.

Law (tests/conformance/test_tuners.py): the distance between the block's outputs and the float block's falls on
the inputs it was tuned on, and what is stored afterwards is exactly what was measured.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from bitmill.architectures.adapter import Seam
from bitmill.config.registry import Member, Registry
from bitmill.formats.base import Format, RangeFormat
from bitmill.formats.quantized import Quantized
from bitmill.models.block_call import BlockCall
from bitmill.numerics.statistics import Statistics
from bitmill.solvers import Solver

TUNERS: Registry[type[Tuner]] = Registry("tuner", "bitmill.tuners")

TARGETS = frozenset({"targets"})  # what `needs` names when a tuner compares with the float model's block outputs


@dataclass
class BlockTask:
    """One block on its way: what a tuner may look at and change.

    block: the module; its linears hold float weights before, decoded ones after they are settled.
    names: the linears to be quantized, by path in the block, in the order in which they run.
    inputs: hidden states (windows, tokens, width), batch by batch, as the quantized blocks before produce them.
    targets: what the float model has after this block, batch by batch; empty unless a tuner needs it.
    dtypes: the types in which the parameters that stay in float will be stored.
    originals: the float weight (out, in) of every settled linear, as it was when it was settled.
    stats: what the linears' inputs were, as far as the recipe needs to know; `gram` alone is kept.
    stages: the linears that read one input, together, in the order in which they run.
    input_stats: of what the first linear of every stage reads, where the recipe needs "activations"; a tuner that
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

    def range_format(self, name: str) -> RangeFormat:
        """Return the format of a linear, one whose grid is fixed by the range of each group."""
        format = self.formats[name]
        assert isinstance(format, RangeFormat)
        return format

    def matrix(self, name: str) -> Tensor:
        """The weight of a linear as (out, in), fp32."""
        weight = self.block.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        return weight.data.T.contiguous() if self.transposed else weight.data

    def input_statistics(self, name: str) -> Statistics:
        """Return the calibration's statistics of a linear's input; empty where none were collected."""
        leads = (stage[0] for stage in self.stages if name in stage)
        return self.input_stats.get(next(leads, ""), Statistics())

    def set_matrix(self, name: str, W: Tensor) -> None:
        """Replace the weight of a linear by W (out, in)."""
        weight = self.block.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.data = (W.T if self.transposed else W).to(weight.device).contiguous()

    def set_quantized(self, name: str, quantized: Quantized) -> None:
        """Note a linear's result, and let the block compute with it as it will be stored."""
        self.originals.setdefault(name, self.matrix(name))
        self.quantized[name] = quantized
        self.set_matrix(name, quantized.dequantize())

    def as_stored(self, name: str, values: Tensor) -> Tensor:
        """What the stored type of a parameter that stays in float keeps of `values`."""
        return values.to(self.dtypes.get(name, values.dtype)).to(values.dtype)

    def set_float(self, name: str, values: Tensor) -> None:
        """Replace a parameter that stays in float by what its stored type keeps of `values`."""
        self.block.get_parameter(name).data = self.as_stored(name, values)

    def run(self, batch: int, tensors: dict[str, Tensor] | None = None) -> Tensor:
        """The block's output for one batch, with whatever its weights are now but for `tensors`, by name."""
        return self.calls[batch].run_with(tensors or {}, self.block, self.inputs[batch])

    def floats(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that stay in float: norms, biases, linears that nobody quantizes."""
        coded = {f"{name}.weight" for name in self.names}
        for name, parameter in self.block.named_parameters():
            if name not in coded:
                yield name, parameter

    @torch.no_grad()
    def error(self, tensors: dict[str, Tensor] | None = None) -> float:
        """Distance between the block's outputs and the targets, a mean over tokens; `tensors` as in `run`."""
        total = sum(
            float(relative_error(self.run(i, tensors), target).sum()) for i, target in enumerate(self.targets)
        )
        return total / max(sum(target[..., 0].numel() for target in self.targets), 1)


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Squared distance of hidden states (..., width) from their targets, as a share of the targets' (...).

    Every token counts alike, as it does for the norms that read it. Left in the units of the hidden states, one
    attention sink, with ten thousand times the energy of other tokens, would be all that a tuner hears of.
    """
    return (output - target).square().mean(-1) / mean_square(target)


def mean_square(hidden: Tensor) -> Tensor:
    """Mean square (...) of hidden states (..., width), and no less than what can be divided by."""
    return hidden.square().mean(-1).clamp(min=1e-30)


@dataclass(frozen=True)
class Tuner(Member, ABC):
    """Base of all tuners: a frozen dataclass of options."""

    registry: ClassVar[Registry[type[Tuner]]] = TUNERS

    @property
    def needs(self) -> frozenset[str]:
        """Statistics, and TARGETS when it compares with the float model."""
        return TARGETS

    def unsupported_reason(self, format: Format) -> str | None:
        """None, or one sentence that says why this tuner cannot work with this weight format."""
        return None

    def unsupported_solver_reason(self, solver: Solver) -> str | None:
        """None, or one sentence that says why what this tuner does before would be lost on this solver."""
        return None

    def before(self, task: BlockTask) -> None:
        """Act while the linears hold float weights."""

    def after(self, task: BlockTask) -> None:
        """Act when every linear is settled."""
