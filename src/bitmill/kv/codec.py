"""Quantization of the keys or the values of a layer: numbers to codes and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.formats.fitting import as_stored, positive
from bitmill.kv.scheme import PAGE, TensorScheme
from bitmill.numerics.hadamard import hadamard
from bitmill.numerics.table import Table

_LLOYD_ROUNDS = 2000


@dataclass(frozen=True)
class CalibratedParams:
    """Calibrated parameters of the keys or the values of a layer; None where the scheme has no use for one.

    Attributes:
        scale, zero: (channels,), of axis "static".
        levels: (2**bits,), the numbers codes decode to; (channels, 2**bits) with levels per channel.
        edges: of that shape, the numbers codes are chosen by where they differ from the levels (q_norm).
        weight: (channels,), importance of an error in a channel when outliers are chosen.
        mean, deviation: (channels,), of equalized channels.
    """

    scale: Tensor | None = None
    zero: Tensor | None = None
    levels: Tensor | None = None
    edges: Tensor | None = None
    weight: Tensor | None = None
    mean: Tensor | None = None
    deviation: Tensor | None = None


def calibrated_shapes(
    scheme: TensorScheme, channels: int, uses_gradients: bool = False
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters that calibration determines.

    Args:
        scheme: of the keys or the values.
        channels: heads * head_dim of the layer.
        uses_gradients: errors are weighted by gradients, so that each channel has a weight where outliers are
            chosen.

    Returns:
        Field of `CalibratedParams` -> shape; parameters the scheme has no use for are absent.
    """
    per_channel, table = (channels,), (1 << scheme.bits,)
    levels = per_channel + table if scheme.axis == "channel" else table
    is_weighted = uses_gradients and scheme.outliers > 0 and scheme.is_calibrated
    shapes = {
        "scale": (per_channel, scheme.axis == "static"),
        "zero": (per_channel, scheme.axis == "static" and scheme.has_zero),
        "levels": (levels, scheme.levels == "learned"),
        "edges": (levels, scheme.q_norm),
        "weight": (per_channel, is_weighted),
        "mean": (per_channel, scheme.equalized),
        "deviation": (per_channel, scheme.equalized),
    }
    return {name: shape for name, (shape, is_used) in shapes.items() if is_used}


@dataclass(frozen=True)
class EncodedPages:
    """Quantized keys or values of whole pages.

    Attributes:
        codes: (rows, pages, 32, channels) uint8.
        scale, zero: (rows, pages, channels) per page or (rows, pages, 32, groups) per token; None where
            calibrated.
        outlier_value: (rows, pages, 32, n) fp32, added to the decoded number.
        outlier_index: (rows, pages, 32, n) int64, channels of the outliers.
    """

    codes: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    outlier_value: Tensor | None = None
    outlier_index: Tensor | None = None


class LevelTable(Protocol):
    """Map between normalized numbers (rows, pages, 32, channels) and codes.

    Attributes:
        values: fp32 (2**bits,), or (channels, 2**bits) with levels per channel: the numbers codes decode to.
    """

    values: Tensor

    def nearest(self, x: Tensor) -> Tensor:
        """Return the uint8 code of the level nearest to each number; `x` may be overwritten."""

    def lookup(self, codes: Tensor) -> Tensor:
        """Return the fp32 levels of codes, in a new tensor."""

    def stack(self, others: Sequence[Any]) -> LevelTable | None:
        """Return the tables of this and further layers as one, by row; None where they cannot be merged."""


class UniformLevels:
    """Levels 0, 1, ..., 2**bits - 1."""

    def __init__(self, bits: int, device: torch.device | None = None) -> None:
        self.values = torch.arange(1 << bits, dtype=torch.float32, device=device)

    def nearest(self, x: Tensor) -> Tensor:
        """Return the nearest codes; overwrites `x`."""
        return x.round_().clamp_(0, len(self.values) - 1).to(torch.uint8)

    def lookup(self, codes: Tensor) -> Tensor:
        """Return codes as fp32."""
        return codes.float()

    def stack(self, others: Sequence[UniformLevels]) -> UniformLevels:
        """Return this table, which is that of every layer."""
        return self


class SharedLevels:
    """One table of levels for all channels.

    Args:
        values: fp32 (2**bits,), levels.
        edges: fp32 (2**bits,), numbers codes are chosen by.
    """

    def __init__(self, values: Tensor, edges: Tensor) -> None:
        self.values, self.edges, self.table = values, edges, Table(edges)

    def nearest(self, x: Tensor) -> Tensor:
        """Return the code of the nearest edge."""
        return self.table.codes(x)

    def lookup(self, codes: Tensor) -> Tensor:
        """Return the levels of codes."""
        return self.values.index_select(0, codes.int().flatten()).view(codes.shape)

    def stack(self, others: Sequence[SharedLevels]) -> LevelTable | None:
        """Return one table for all layers where theirs are equal, else thresholds per row.

        None where the numbers of distinct levels differ, or codes do not ascend with levels.
        """
        if all(torch.equal(self.values, t.values) and torch.equal(self.edges, t.edges) for t in others):
            return self
        tables = [self, *others]
        found = [edges for table in tables if (edges := table.table.edges_in_order()) is not None]
        if len(found) != len(tables) or len({len(edges) for edges in found}) != 1:
            return None
        thresholds = [threshold.view(-1, 1, 1, 1) for threshold in torch.stack(found).unbind(-1)]
        values = torch.stack([table.values for table in tables])
        return ThresholdLevels(values, thresholds, _row_numbers(values) * values.shape[-1])


class ThresholdLevels:
    """Levels that differ between channels or rows: a code is the number of thresholds below a number.

    Args:
        values: fp32 (..., 2**bits), the tables.
        thresholds: 2**bits - 1 tensors that broadcast to (rows, pages, 32, channels).
        offsets: int32 that broadcasts likewise: position of each number's table in the flattened `values`.
    """

    def __init__(self, values: Tensor, thresholds: Sequence[Tensor], offsets: Tensor) -> None:
        self.values, self.thresholds, self.offsets = values, thresholds, offsets

    @classmethod
    def per_channel(cls, values: Tensor, edges: Tensor) -> ThresholdLevels:
        """Return levels per channel whose codes are chosen by the nearest edge.

        Args:
            values: fp32 (channels, 2**bits), levels.
            edges: fp32, of that shape, ascending.
        """
        thresholds = ((edges[:, 1:] + edges[:, :-1]) / 2).T.contiguous().unbind()
        offsets = torch.arange(len(values), dtype=torch.int32, device=values.device) * values.shape[1]
        return cls(values, thresholds, offsets)

    def nearest(self, x: Tensor) -> Tensor:
        """Return the number of thresholds each number exceeds."""
        codes = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
        for threshold in self.thresholds:  # few, and each for all numbers at once
            codes += (x > threshold).view(torch.uint8)
        return codes

    def lookup(self, codes: Tensor) -> Tensor:
        """Return the levels of codes."""
        index = codes.int() + self.offsets
        return self.values.flatten().index_select(0, index.flatten()).view(codes.shape)

    def stack(self, others: Sequence[ThresholdLevels]) -> ThresholdLevels:
        """Return the levels (layers, channels, 2**bits) of channels of all layers."""
        tables = [self, *others]
        values = torch.stack([table.values for table in tables])
        each = zip(*(table.thresholds for table in tables), strict=True)
        thresholds = [torch.stack(same)[:, None, None] for same in each]
        return ThresholdLevels(values, thresholds, _row_numbers(values) * self.values.numel() + self.offsets)


def _row_numbers(values: Tensor) -> Tensor:
    """Return 0, 1, ... for tables (rows, ...), as int32 (rows, 1, 1, 1)."""
    return torch.arange(len(values), dtype=torch.int32, device=values.device).view(-1, 1, 1, 1)


@dataclass(frozen=True, eq=False)
class TensorCodec:
    """Encoder and decoder of the keys or the values of a layer.

    Attributes:
        scheme: storage scheme.
        heads, dim: key/value heads of the layer, and the head dimension.
        levels: table of levels.
        scale, zero: fp32, broadcast to (rows, pages, 32, channels), where channels are static.
        error_weight: fp32, broadcast likewise: importance of errors when outliers are chosen; None for 1.
        rotation: fp32 (dim, dim), orthogonal, of rotated heads.
        mean, deviation: fp32 (heads, 1, dim), of equalized channels.
    """

    scheme: TensorScheme
    heads: int
    dim: int
    levels: LevelTable
    scale: Tensor | None = None
    zero: Tensor | None = None
    error_weight: Tensor | None = None
    rotation: Tensor | None = None
    mean: Tensor | None = None
    deviation: Tensor | None = None

    @classmethod
    def from_params(
        cls,
        scheme: TensorScheme,
        heads: int,
        dim: int,
        params: CalibratedParams,
        device: torch.device | None = None,
    ) -> TensorCodec:
        """Return the codec of one layer.

        Args:
            scheme: storage scheme of its keys or values.
            heads: key/value heads.
            dim: head dimension.
            params: calibrated parameters the scheme needs.
            device: of the tensors to encode.

        Raises:
            RecipeError: heads of this size do not suit the scheme.
        """
        scheme.num_groups(heads, dim)

        def on_device(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.to(device, torch.float32).contiguous()

        def per_head(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.view(heads, 1, dim)

        return cls(
            scheme,
            heads,
            dim,
            _level_table(scheme, on_device(params.levels), on_device(params.edges), device),
            on_device(params.scale),
            on_device(params.zero),
            on_device(params.weight),
            on_device(hadamard_rotation(dim)) if scheme.rotated else None,
            per_head(on_device(params.mean)),
            per_head(on_device(params.deviation)),
        )

    @classmethod
    def stack(cls, codecs: Sequence[TensorCodec]) -> TensorCodec | None:
        """Return the codecs of several layers of one scheme and shape as one, whose rows are the layers.

        It encodes and decodes pages; rotation, mean and deviation are left out, as it changes no basis. None where
        the level tables of the layers cannot be merged.
        """
        first, *others = codecs
        levels = first.levels.stack([codec.levels for codec in others])
        if levels is None:
            return None

        def rows(name: str) -> Tensor | None:
            found = [values for codec in codecs if (values := getattr(codec, name)) is not None]
            return torch.stack(found)[:, None, None] if found else None

        scale, zero, weight = rows("scale"), rows("zero"), rows("error_weight")
        return cls(first.scheme, first.heads, first.dim, levels, scale, zero, weight)

    @property
    def channels(self) -> int:
        """Return the numbers of a token."""
        return self.heads * self.dim

    @property
    def num_groups(self) -> int:
        """Return the channel groups of a token with a scale each."""
        return self.scheme.num_groups(self.heads, self.dim)

    @property
    def num_outliers(self) -> int:
        """Return the outliers of a token."""
        return self.scheme.num_outliers(self.channels)

    @property
    def has_storage_basis(self) -> bool:
        """Return True if numbers are stored in another basis than the model's."""
        return self.rotation is not None or self.mean is not None

    def to_storage_basis(self, x: Tensor) -> Tensor:
        """Return numbers (rows, heads, tokens, dim) of the model in the basis that is stored, fp32."""
        if self.rotation is not None:
            return x.float() @ self.rotation.mT
        if self.mean is None or self.deviation is None:
            return x.float()
        return (x.float() - self.mean) / self.deviation

    def from_storage_basis(self, x: Tensor) -> Tensor:
        """Return the inverse of `to_storage_basis`; also valid for weighted sums whose weights add up to 1."""
        if self.rotation is not None:
            return x.float() @ self.rotation
        if self.mean is None or self.deviation is None:
            return x.float()
        return x.float() * self.deviation + self.mean

    def encode(self, x: Tensor) -> EncodedPages:
        """Quantize numbers (rows, tokens, channels) in the storage basis; tokens is a multiple of 32."""
        pages = x.float().unflatten(1, (-1, PAGE))
        scale, zero = self._scale_and_zero(pages)
        wide_scale, wide_zero = self._per_number(scale), self._per_number(zero)
        codes = self.levels.nearest(_normalize(pages, wide_scale, wide_zero))
        own_scale, own_zero = (None, None) if self.scheme.is_static else (scale, zero)
        count = self.num_outliers
        if not count:
            return EncodedPages(codes, own_scale, own_zero)
        error = pages - self._dequantize(codes, wide_scale, wide_zero)
        importance = error.abs() if self.error_weight is None else error.abs() * self.error_weight
        index = importance.topk(count, -1).indices
        return EncodedPages(codes, own_scale, own_zero, error.gather(-1, index).to(torch.float16).float(), index)

    def decode(self, encoded: EncodedPages) -> Tensor:
        """Return the numbers (rows, tokens, channels) of pages, fp32, in the storage basis."""
        scale, zero = (self.scale, self.zero) if self.scheme.is_static else (encoded.scale, encoded.zero)
        x = self._dequantize(encoded.codes, self._per_number(scale), self._per_number(zero))
        if encoded.outlier_value is not None and encoded.outlier_index is not None:
            x = x.scatter_add(-1, encoded.outlier_index, encoded.outlier_value)
        return x.flatten(1, 2)

    def normalize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return numbers (rows, tokens, channels) as they are compared with levels, and their scales, of that
        shape.

        Only for schemes with a scale.
        """
        pages = x.float().unflatten(1, (-1, PAGE))
        scale, zero = (self._per_number(values) for values in self._scale_and_zero(pages))
        normal = _normalize(pages, scale, zero)
        assert scale is not None
        return normal.flatten(1, 2), scale.expand(pages.shape).flatten(1, 2)

    def _scale_and_zero(self, pages: Tensor) -> tuple[Tensor | None, Tensor | None]:
        scheme = self.scheme
        if scheme.axis == "channel":
            return None, None
        if scheme.axis == "static":
            assert self.scale is not None
            return self.scale, self.zero
        if scheme.axis == "page":
            return affine(pages.amin(2), pages.amax(2), scheme)
        count = self.num_groups
        groups = pages.unflatten(-1, (count, -1))
        if scheme.levels == "normal":
            scale = groups.square().mean(-1).sqrt().clamp(2.0**-24, 65504)
            return scale.to(torch.float16).float(), None
        cut = 0 if count > 1 else self.num_outliers
        low, high = _lower_end(groups, cut // 2), _lower_end(groups.neg(), cut - cut // 2).neg()
        return affine(low, high, scheme)

    def _per_number(self, values: Tensor | None) -> Tensor | None:
        """Return scales or zeros so that they broadcast with pages (rows, pages, 32, channels)."""
        if values is None or self.scheme.is_static:
            return values
        if self.scheme.axis == "page":
            return values[:, :, None]
        count = self.num_groups
        return values.repeat_interleave(self.channels // count, -1) if count > 1 else values

    def _dequantize(self, codes: Tensor, scale: Tensor | None, zero: Tensor | None) -> Tensor:
        x = self.levels.lookup(codes)
        if self.scheme.axis == "channel":
            return x
        assert scale is not None
        x *= scale
        return x if zero is None else x.add_(zero)


def _level_table(
    scheme: TensorScheme, levels: Tensor | None, edges: Tensor | None, device: torch.device | None
) -> LevelTable:
    if scheme.levels == "uniform":
        return UniformLevels(scheme.bits, device)
    if levels is None:
        levels = torch.tensor(normal_levels(scheme.bits), device=device)
    edges = levels if edges is None else edges
    return ThresholdLevels.per_channel(levels, edges) if scheme.axis == "channel" else SharedLevels(levels, edges)


def _normalize(pages: Tensor, scale: Tensor | None, zero: Tensor | None) -> Tensor:
    if scale is None:
        return pages
    return pages / scale if zero is None else (pages - zero) / scale


def _lower_end(groups: Tensor, cut: int) -> Tensor:
    """Return the minimum of the last axis without the `cut` smallest numbers."""
    if not cut:
        return groups.amin(-1)
    return groups.topk(cut + 1, -1, largest=False).values[..., -1]


@cache
def normal_levels(bits: int) -> tuple[float, ...]:
    """Return the 2**bits ascending levels of least squared error for a standard normal number.

    Lloyd 1982 and Max 1960: each level is the mean of its interval, each edge the midpoint of two levels.
    """
    normal = torch.distributions.Normal(0.0, 1.0)
    count = 1 << bits
    levels = normal.icdf((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    infinite = torch.tensor([math.inf], dtype=torch.float64)
    for _ in range(_LLOYD_ROUNDS):
        edges = torch.cat([-infinite, (levels[1:] + levels[:-1]) / 2, infinite])
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        levels = (density[:-1] - density[1:]) / normal.cdf(edges).diff()
    return tuple(levels.tolist())


def affine(low: Tensor, high: Tensor, scheme: TensorScheme) -> tuple[Tensor, Tensor]:
    """Return the scale and zero that map a range onto the levels, rounded to fp16.

    Uniform levels span 0 to 2**bits - 1; learned levels were learned for -1 to 1.

    Args:
        low, high: ends of the ranges.
        scheme: storage scheme.

    Returns:
        Scale and zero, of the shape of `low`.
    """
    if scheme.levels == "uniform":
        scale, zero = (high - low) / ((1 << scheme.bits) - 1), low
    else:
        scale, zero = (high - low) / 2, (high + low) / 2
    return as_stored(positive(scale)), as_stored(zero)


def hadamard_rotation(dim: int) -> Tensor:
    """Return the orthogonal Hadamard matrix (dim, dim). Raise RecipeError where none is available."""
    base = dim
    while (matrix := hadamard(base)) is None and base % 2 == 0:
        base //= 2
    doubled = hadamard(dim // base)
    if matrix is None or doubled is None:
        raise RecipeError(
            f"No Hadamard matrix of order {dim} is available, and heads have {dim} numbers; use another method."
        )
    return torch.kron(doubled, matrix) / dim**0.5
