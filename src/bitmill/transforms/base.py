"""The contract of a transform: an exact change of the float model before it is quantized.

A seam transform acts where a matrix and its inverse may be inserted without changing the function: the output
channels of a norm or a linear layer are divided by s, the input columns of the layers that read them are
multiplied by s. It only chooses s; folding it is done here, once, for every architecture that describes its seams.
A format transform acts on a layer's own matrix and is undone at run time, by the wrapper that it puts around the
weight format.

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
    """One seam in the form that a transform receives.

    source: the weight of the norm (channels,) or linear layer (channels, in) before the seam.
    targets: the weights (out, columns) of the linear layers after it that will be quantized.
    format: the core of the targets' format.
    stats: statistics of the targets' inputs; empty for a transform that does not need them.
    heads: of the source. With grouped queries the targets have more columns than the source has channels: they
        read every head several times in turn.
    """

    source: Tensor
    targets: list[Tensor]
    format: GroupFormat
    stats: Statistics = Statistics()
    heads: int = 1

    def columns(self, values: Tensor) -> Tensor:
        """Expand values of the channels (channels,) to the targets' columns (columns,)."""
        return expand_channels(values, self.targets[0].shape[1], self.heads)

    def readers(self, values: Tensor) -> Tensor:
        """Group values of the columns (columns,) by the channel that they read: (readers, channels)."""
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
        """{"activations"} for a transform that uses statistics of the layers' inputs."""
        return frozenset()


class SeamTransform(Transform):
    """A transform that scales channels at the seams."""

    @abstractmethod
    def choose(self, seam: SeamView) -> Tensor:
        """Return the positive scale s (channels,) for one seam."""


class FormatTransform(Transform):
    """A transform that changes the basis in which each matrix is stored."""

    @abstractmethod
    def wrap(self, format: Format) -> Wrapper:
        """Return the wrapper around `format` that undoes the change."""


def fold(scale: Tensor, seam: Seam, tensors: Mapping[str, Tensor], transposed: bool) -> dict[str, Tensor]:
    """Divide the seam's source by a scale and multiply the columns of its targets by it.

    The arguments are not changed, and gradients reach the scale.

    Args:
        scale: (channels,).
        seam: of the architecture.
        tensors: the parameters of the block, by name.
        transposed: weights are (in, out) (GPT-2).

    Returns:
        The parameters that change, by name.
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
        columns = expand_channels(scale, weight.shape[0 if transposed else 1], seam.heads)
        changed[target] = weight * (columns[:, None] if transposed else columns[None, :])
    return changed


def expand_channels(values: Tensor, columns: int, heads: int) -> Tensor:
    """Expand values of a seam's channels to its targets' columns: each head is repeated in turn.

    Args:
        values: (channels,).
        columns: of the targets.
        heads: of the source.

    Returns:
        (columns,).
    """
    repeats = columns // values.shape[0]
    return values if repeats == 1 else values.unflatten(0, (heads, 1, -1)).expand(-1, repeats, -1).flatten()
