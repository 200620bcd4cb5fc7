"""The contract of a transform: an exact change of the float model at a seam.

A seam is a place where a matrix and its inverse may be inserted without changing the function: the output
channels of a norm or a linear layer are divided by s, the input columns of the layers that read them are
multiplied by s. A transform only chooses s; folding it is done here, once, for every architecture that
describes its seams.

Law (tests/conformance/test_transforms.py): the float model's logits change by less than 1e-4 relative.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.errors import RecipeError
from bitmill.fields import check_types
from bitmill.registry import Registry

TRANSFORMS: Registry[type[Transform]] = Registry("transform", "bitmill.transforms")


@dataclass(frozen=True)
class Transform(ABC):
    """Base of all transforms: a frozen dataclass of options."""

    def __post_init__(self) -> None:
        check_types(self, type(self).__name__)

    @property
    def name(self) -> str:
        """The registered name."""
        return TRANSFORMS.name_of(self)

    @abstractmethod
    def choose(self, source: Tensor, targets: list[Tensor]) -> Tensor:
        """The positive scale s (channels,) for one seam.

        source: the weight of the norm (channels,) or linear layer (channels, in) before the seam.
        targets: the weights (out, channels) of the linear layers after it.
        """

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `transform_from_dict` turns back into an equal transform."""
        return {"transform": self.name, **asdict(self)}


def transform_from_dict(data: dict[str, Any]) -> Transform:
    """The transform described by `Transform.to_dict`. Raises RecipeError on unknown names or fields."""
    fields = dict(data)
    name = fields.pop("transform", None)
    if not isinstance(name, str):
        raise RecipeError(f"A transform needs the field 'transform' with its name; found {data!r}.")
    kind = TRANSFORMS.get(name)
    try:
        return kind(**fields)
    except TypeError as error:
        raise RecipeError(f"The transform {name!r} cannot be built from {fields!r}: {error}.") from None


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
