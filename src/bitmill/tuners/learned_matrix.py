"""A matrix whose float weights, scales and zeros are learned, as numbers that its format can store."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitmill.formats.base import Params
from bitmill.formats.fitting import FP16_TINY
from bitmill.formats.part import Part
from bitmill.formats.quantized import Quantized, nearest_matrix
from bitmill.formats.soft_rounding import soft_quantize


class LearnedMatrix(nn.Module):
    """Float weights and the parameters of their format, both trained; `forward` returns the rounded matrix.

    Parameters are `weight` (out, in) and one for each part of the format that is a number, under its name, such as
    `scale` and `zero`. Parts that are indices are buffers and do not change. At a `temperature` above 0 the matrix
    is rounded softly, see `numerics.soft_rounding`; `quantized` always rounds to the nearest.

    Args:
        W: fp32 (out, in), the weights to start from.
        start: the matrix in its format, whose parameters training starts from.
    """

    def __init__(self, W: Tensor, start: Quantized) -> None:
        super().__init__()
        self.format, self.shape, self.temperature = start.format, start.shape, 0.0
        self.weight = nn.Parameter(W.detach().clone().float())
        self._parts = {part.name: part for part in self.format.parts(self.shape)}
        self._positive = {name for name, value in start.params.items() if bool((value > 0).all())}
        self._names = tuple(start.params)
        for name, value in start.params.items():
            if self._is_learned(name):
                self.register_parameter(name, nn.Parameter(value.detach().clone()))
            else:
                self.register_buffer(name, value.detach().clone())

    def _is_learned(self, name: str) -> bool:
        part = self._parts.get(name)
        if part is None or name in self.format.shared:  # whose effect on other layers is unknown
            return False
        return name in self.format.learned_integers or (part.bits is None and part.stored_as.is_floating_point)

    def params(self) -> Params:
        """Return the format's parameters as stored, with gradients."""
        return {name: self._param(name) for name in self._names}

    def _param(self, name: str) -> Tensor:
        value: Tensor = getattr(self, name)
        if not isinstance(value, nn.Parameter):
            return value
        return stored_form(self._parts[name], value.float(), name in self._positive)

    def learned_params(self) -> list[nn.Parameter]:
        """Return the parameters of the format that are learned."""
        return [self._parameters[name] for name in self._names if name in self._parameters]  # type: ignore[misc]

    def forward(self) -> Tensor:
        """Return the rounded matrix, fp32 (out, in), with gradients."""
        if self.temperature:
            return soft_quantize(self.format, self.weight.float(), self.params(), self.temperature)
        return self.format.fake_quantize(self.weight.float(), self.params())

    @torch.no_grad()
    def quantized(self) -> Quantized:
        """Return the matrix in its format; it decodes to what `forward` returns at temperature 0, bit by bit."""
        params = self.params()
        return Quantized(self.format, self.format.nearest_codes(self.weight.float(), params), params, self.shape)


@torch.no_grad()
def start_weights(W: Tensor, start: Quantized) -> Tensor:
    """Return weights that are rounded to a quantized matrix: those of W, or the decoded ones where W is not.

    Args:
        W: fp32 (out, in), the float weights.
        start: the matrix, whose codes a solver may have chosen otherwise than by rounding.
    """
    decoded = start.dequantize()
    return torch.where(nearest_matrix(start.format, W, start.params).dequantize() == decoded, W, decoded)


def stored_form(part: Part, values: Tensor, positive: bool) -> Tensor:
    """Return values as a part stores them; gradients pass as if they were left as they are.

    Args:
        part: where they are stored.
        values: fp32.
        positive: keep them above 0, as a scale must be.
    """
    exact = values.detach()
    if part.bits is not None:
        stored = exact.round().clamp(0, (1 << part.bits) - 1)
    else:
        limit = torch.finfo(part.stored_as).max
        stored = exact.clamp(FP16_TINY if positive else -limit, limit).to(part.stored_as).float()
    return stored + (values - exact)
