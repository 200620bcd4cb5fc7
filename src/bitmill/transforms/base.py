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
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bitmill.formats import Format, GroupFormat, Wrapper
from bitmill.registry import Member, Registry

TRANSFORMS: Registry[type[Transform]] = Registry("transform", "bitmill.transforms")


@dataclass(frozen=True)
class Activations:
    """What calibration saw of the tensor X (tokens, channels) that several linears read.

    gram: X^T X / tokens, (channels, channels).  mean_abs, max_abs: of every channel.
    """

    gram: Tensor
    mean_abs: Tensor
    max_abs: Tensor
    tokens: int

    def divided(self, scale: Tensor) -> Activations:
        """The same for X / scale."""
        gram = self.gram / (scale[:, None] * scale[None, :])
        return Activations(gram, self.mean_abs / scale, self.max_abs / scale, self.tokens)


@dataclass(frozen=True)
class SeamView:
    """One seam as a transform sees it.

    source: the weight of the norm (channels,) or linear layer (channels, in) before the seam.
    targets: the weights (out, channels) of the linear layers after it.
    format: what the targets will be quantized to.
    activations: what the targets read; None for a transform that does not need it.
    """

    source: Tensor
    targets: list[Tensor]
    format: GroupFormat
    activations: Activations | None = None


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


@torch.no_grad()
def fold(scale: Tensor, source: nn.Module, targets: list[nn.Module], plus_one: bool, transposed: bool) -> None:
    """Divide the seam's source by `scale` (channels,) and multiply its targets' input columns by it, in place.

    plus_one: the norm multiplies by 1 + weight (Gemma).  transposed: weights are (in, out) (GPT-2).
    """
    weight, bias = source.weight, getattr(source, "bias", None)
    assert isinstance(weight, Tensor)
    if weight.dim() == 1:
        weight.copy_((weight + 1) / scale - 1 if plus_one else weight / scale)
    else:
        weight.div_(scale[None, :] if transposed else scale[:, None])
    if bias is not None:
        bias.div_(scale)
    for target in targets:
        assert isinstance(target.weight, Tensor)
        target.weight.mul_(scale[:, None] if transposed else scale[None, :])
