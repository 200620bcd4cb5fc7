"""Products of attention in integers: of what formats store as integers of one or more bytes.

    a_i = s_i (A_i - x_i)      b_j = t_j (B_j - y_j)
    a_i b_j = s_i t_j (sum over c of A_ic B_jc - x_i sum over c of B_jc - y_j sum over c of A_ic + n x_i y_j)

A_ic is the sum over k of 256^k times byte k. Bytes multiply as int8 and are summed in int32; what follows is
computed in fp64, which holds every sum exactly where integers have up to three bytes, and is rounded to fp32 once.
Codes of logarithms become integers by their tables of multipliers and shifts (`bitmill.formats.logarithm`). A sum
needs one scale: a scale a row, or one for all numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from bitmill.architectures.attention import Contracted, Rounding
from bitmill.compat import is_traced
from bitmill.formats import Format, GroupFormat, Params
from bitmill.formats.quantized import Quantized, fit_matrix, nearest_matrix

_LONGEST = 1 << 17  # terms of a sum of products of bytes, which int32 holds
_SCORES = 1 << 20  # products in fp64 at a time
_ONE_A_ROW = ("row", "tensor")  # sizes of groups that give a row one scale


@dataclass(frozen=True)
class FormatRounding(Rounding):
    """Rounds numbers to a format.

    Attributes:
        format: of the numbers.
        params: static parameters, (1, 1) each; None where each call has its own.
        channels: rows of numbers are channels.
    """

    format: Format
    params: Params | None = None
    channels: bool = False

    def __call__(self, numbers: Tensor) -> Tensor:
        """Return numbers (rows, columns) as they are stored; NaN in rows with NaN or Inf."""
        quantized, broken = self.quantize(numbers)
        return quantized.dequantize().masked_fill(broken, torch.nan)

    def quantize(self, numbers: Tensor) -> tuple[Quantized, Tensor]:
        """Return numbers (rows, columns) as stored, and bool (rows, 1): True in rows with NaN or Inf."""
        assert isinstance(self.format, GroupFormat)
        broken = ~torch.isfinite(numbers).all(1, keepdim=True)  # has no scale, and stays visible
        numbers = numbers.masked_fill(broken, 0.0)
        params = self.params
        if params is None:
            params = fit_matrix(self.format, numbers, None, search=False)
        return nearest_matrix(self.format, numbers, params), broken

    def product(
        self, a: Tensor, other: Rounding | None, b: Tensor, contracted: Contracted = "columns"
    ) -> Tensor | None:
        """Return the product of rounded numbers in integers; None where they have none, or a gradient passes."""
        if not isinstance(other, FormatRounding) or not a.numel() or not b.numel():
            return None
        if self.float_reason(other, contracted) or not _computes(a, b) or a.shape[-1] >= _LONGEST:
            return None
        found = multiply(self.integers(a), other.integers(b, contracted))
        return found.view(*a.shape[:-1], -1)

    def float_reason(self, other: FormatRounding, contracted: Contracted) -> str | None:
        """Return why the numbers of two roundings multiply in floats; None for integers."""
        mine, others = self.format, other.format
        assert isinstance(mine, GroupFormat)
        assert isinstance(others, GroupFormat)
        if mine.input_arithmetic != "integer" or others.arithmetic != "integer":
            return f"no kernel multiplies numbers in {mine.name} with numbers in {others.name}"
        fitting = ("tensor",) if contracted == "rows" else _ONE_A_ROW
        if mine.group_size not in _ONE_A_ROW or others.group_size not in fitting:
            return "the numbers of a sum have several scales"
        return None

    def integers(self, numbers: Tensor, contracted: Contracted = "columns") -> Integers:
        """Return numbers (..., rows, columns) as integers, with rows and columns swapped where rows are summed."""
        assert isinstance(self.format, GroupFormat)
        rows, columns = numbers.shape[-2:]
        quantized, broken = self.quantize(numbers.reshape(-1, columns).float())
        digits, scale, zero = self.format.integer_digits(quantized.codes, quantized.params)
        digits, broken = digits.view(len(digits), -1, rows, columns), broken.view(-1, rows, 1)
        if contracted == "rows":  # with one scale; a broken number is in every sum
            digits, broken = digits.transpose(2, 3), broken.any(1, keepdim=True)
        matrices, rows = digits.shape[1:3]
        zero = torch.zeros_like(scale) if zero is None else zero
        of_rows = (each.double().expand(matrices * rows, 1).reshape(matrices, rows, 1) for each in (scale, zero))
        scale, zero = of_rows
        return Integers(digits, scale.masked_fill(broken, torch.nan), zero)


@dataclass(frozen=True)
class Integers:
    """Matrices scale * (sum over k of 256^k digits[k] - zero).

    Attributes:
        digits: int8 (bytes, matrices, rows, columns).
        scale, zero: fp64 (matrices, rows, 1).
    """

    digits: Tensor
    scale: Tensor
    zero: Tensor

    def row_sums(self) -> Tensor:
        """Return the sums of the integers of each row, fp64 (matrices, rows, 1)."""
        sums = self.digits.sum(-1, keepdim=True, dtype=torch.int32)
        return _joined(sums)


def multiply(a: Integers, b: Integers) -> Tensor:
    """Return the products a b^T of every two matrices, fp32 (matrices, rows of a, rows of b).

    Args:
        a: matrices (rows of a, columns).
        b: matrices (rows of b, columns), whose integers have one byte.
    """
    matrices, rows, columns = a.digits.shape[1:]
    out = torch.empty(matrices, rows, b.digits.shape[2])
    sums_a, sums_b = a.row_sums(), b.row_sums().transpose(1, 2)
    zero_b, scale_b = b.zero.transpose(1, 2), b.scale.transpose(1, 2)
    step = max(1, _SCORES // max(1, out[0].numel()))
    for first in range(0, matrices, step):
        at = slice(first, first + step)
        products = _joined(_sums(a.digits[:, at], b.digits[0, at]))
        products -= a.zero[at] * (sums_b[at] - columns * zero_b[at])
        products -= zero_b[at] * sums_a[at]
        out[at] = products.mul_(a.scale[at]).mul_(scale_b[at])
    return out


def _sums(a: Tensor, b: Tensor) -> Tensor:
    """Return sums of products of bytes.

    Args:
        a: int8 (bytes, matrices, rows, columns).
        b: int8 (matrices, rows of b, columns).

    Returns:
        int32 (bytes, matrices, rows, rows of b).
    """
    times = _int8_product()
    both = [
        times(left.reshape(-1, left.shape[-1]), right.T) for left, right in zip(a.transpose(0, 1).contiguous(), b)
    ]
    return torch.stack(both).view(len(both), len(a), a.shape[2], -1).transpose(0, 1)


def _joined(sums: Tensor) -> Tensor:
    """Return the sum over k of 256^k times the sums of byte k, fp64."""
    joined = sums[-1].double()
    for of_byte in sums.flip(0)[1:]:
        joined.mul_(256.0).add_(of_byte)
    return joined


def _computes(a: Tensor, b: Tensor) -> bool:
    """Return True on a CPU where no gradient passes."""
    learns = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    return a.device.type == b.device.type == "cpu" and not learns and not is_traced(a)


@cache
def _int8_product() -> Callable[[Tensor, Tensor], Tensor]:
    """Return torch's product of int8 matrices where it is exact: some processors saturate sums of two products."""

    def plain(a: Tensor, b: Tensor) -> Tensor:
        return a.to(torch.int32) @ b.to(torch.int32)

    fast: Callable[[Tensor, Tensor], Tensor] | None = getattr(torch, "_int_mm", None)
    extremes = torch.tensor([-128, 127, 127, -128, -128, 127, 1, -1], dtype=torch.int8).repeat(4, 16)
    flipped = torch.cat([extremes, -extremes.clamp(min=-127)])
    try:
        exact = fast is not None and torch.equal(fast(extremes, flipped.T), plain(extremes, flipped.T))
    except RuntimeError:
        exact = False
    return fast if fast is not None and exact else plain
