"""The contract of a transform: an exact change of the float model before it is quantized.

A seam transform acts where a matrix and its inverse may be inserted without changing the function: the output
channels of a norm or a linear layer are divided by s, the input columns of the layers that read them are
multiplied by s. It only chooses s; folding it is done here, once, for every architecture that describes its
seams. A format transform acts on a layer's own matrix and is undone at run time, by the wrapper it puts around
the weight format.

Law (tests/conformance/test_transforms.py): the float model's logits change by less than 1e-4 relative.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from bitmill.config.registry import Member, Registry
from bitmill.formats import Format, GroupFormat, Wrapper
from bitmill.numerics.statistics import Statistics

if TYPE_CHECKING:
    from bitmill.architectures.adapter import Seam

TRANSFORMS: Registry[type[Transform]] = Registry("transform", "bitmill.transforms")


@dataclass(frozen=True)
class SeamView:
    """One seam as a transform sees it.

    source: the weight of the norm (channels,) or linear layer (channels, in) before the seam.
    targets: the weights (out, columns) of the linear layers after it that will be quantized.
    format: what the targets will be quantized to.
    stats: statistics of what the targets read; empty for a transform that does not need them.
    heads: of the source. With grouped queries the targets have more columns than the source has channels: they
        read every head several times in turn.
    """

    source: Tensor
    targets: list[Tensor]
    format: GroupFormat
    stats: Statistics = Statistics()
    heads: int = 1

    def columns(self, values: Tensor) -> Tensor:
        """Values of the channels (channels,) as the targets' columns (columns,) see them."""
        return spread(values, self.targets[0].shape[1], self.heads)

    def readers(self, values: Tensor) -> Tensor:
        """Values of the columns (columns,) by the channel they read: (readers of a channel, channels)."""
        repeats = values.shape[0] // self.source.shape[0]
        if repeats == 1:
            return values[None]
        return values.unflatten(0, (self.heads, repeats, -1)).transpose(0, 1).flatten(1)


@dataclass(frozen=True)
class Transform(Member, ABC):
    """Base of all transforms: a frozen dataclass of options."""

    registry: ClassVar[Registry[type[Transform]]] = TRANSFORMS

    @property
    def needs(self) -> frozenset[str]:
        """{"activations"} when it looks at what the layers read."""
        return frozenset()


class SeamTransform(Transform):
    """Scales channels at the seams."""

    @abstractmethod
    def choose(self, seam: SeamView) -> Tensor:
        """The positive scale s (channels,) for one seam."""


class FormatTransform(Transform):
    """Changes the basis in which each matrix is stored."""

    @abstractmethod
    def wrap(self, format: Format) -> Wrapper:
        """The format that undoes the change around `format`."""


def fold(scale: Tensor, seam: Seam, tensors: Mapping[str, Tensor], transposed: bool) -> dict[str, Tensor]:
    """Divide the seam's source by `scale` (channels,) and multiply what its targets read by it.

    tensors: the parameters of the block, by name.  transposed: weights are (in, out) (GPT-2).
    Returns those that change, and leaves its arguments alone: a scale can be learned through it.
    """
    weight, bias = tensors[f"{seam.source}.weight"], tensors.get(f"{seam.source}.bias")
    if weight.dim() == 1:
        divided = (weight + 1) / scale - 1 if seam.norm_plus_one else weight / scale
    else:
        divided = weight / (scale[None, :] if transposed else scale[:, None])
    changed = {f"{seam.source}.weight": divided}
    if bias is not None:
        changed[f"{seam.source}.bias"] = bias / scale
    for target in (f"{name}.weight" for name in seam.targets):
        weight = tensors[target]
        columns = spread(scale, weight.shape[0 if transposed else 1], seam.heads)
        changed[target] = weight * (columns[:, None] if transposed else columns[None, :])
    return changed


def spread(values: Tensor, columns: int, heads: int) -> Tensor:
    """Values of a seam's channels (channels,) as its targets' `columns` see them: each head repeated in turn."""
    repeats = columns // values.shape[0]
    return values if repeats == 1 else values.unflatten(0, (heads, 1, -1)).expand(-1, repeats, -1).flatten()
