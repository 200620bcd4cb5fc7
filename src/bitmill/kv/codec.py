"""Numbers to codes and back, for the keys or the values of a layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.kv.levels import affine, fixed_levels
from bitmill.kv.scheme import PAGE, TensorScheme
from bitmill.numerics.hadamard import hadamard
from bitmill.numerics.table import Table


@dataclass(frozen=True)
class CalibratedParams:
    """What calibration found for one side of a layer; parts that the side has no use for are None.

    scale, zero: (channels,), of static channels.  levels: (2**bits,), what codes stand for; (channels, 2**bits)
    where each channel has its own.  edges: of that shape, what codes are chosen by; they differ with q_norm.
    weight: (channels,), how much an error matters there when outliers are chosen.
    mean, deviation: (channels,), of equalized ones.
    """

    scale: Tensor | None = None
    zero: Tensor | None = None
    levels: Tensor | None = None
    edges: Tensor | None = None
    weight: Tensor | None = None
    mean: Tensor | None = None
    deviation: Tensor | None = None


def calibrated_shapes(side: TensorScheme, channels: int, weighed: bool = False) -> dict[str, tuple[int, ...]]:
    """What calibration finds for one side of a layer: fields of `CalibratedParams`, and their shapes.

    weighed: errors are weighed by gradients, so that each channel has a weight where outliers are chosen.
    """
    own, table = (channels,), (1 << side.bits,)
    levels = own + table if side.axis == "channel" else table
    wanted = {
        "scale": (own, side.axis == "static"),
        "zero": (own, side.axis == "static" and side.has_zero),
        "levels": (levels, side.levels == "learned"),
        "edges": (levels, side.q_norm),
        "weight": (own, weighed and side.outliers > 0 and side.is_calibrated),
        "mean": (own, side.equalized),
        "deviation": (own, side.equalized),
    }
    return {name: shape for name, (shape, is_there) in wanted.items() if is_there}


@dataclass(frozen=True)
class EncodedPages:
    """Pages of one side. codes (rows, pages, 32, channels) uint8.

    scale, zero: (rows, pages, channels) per page, (rows, pages, 32, groups) per token, None where calibrated.
    outlier_value, outlier_index: (rows, pages, 32, n), fp32 and int64; what is added to the decoded number.
    """

    codes: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    outlier_value: Tensor | None = None
    outlier_index: Tensor | None = None


class TensorCodec:
    """Encodes and decodes one side of a layer with `heads` heads of `dim` numbers."""

    def __init__(
        self,
        side: TensorScheme,
        heads: int,
        dim: int,
        calibrated: CalibratedParams,
        device: torch.device | None = None,
    ) -> None:
        self.side, self.heads, self.dim = side, heads, dim
        self.channels = heads * dim
        self.groups = side.groups(heads, dim)
        self.outliers = side.outlier_count(self.channels)

        def there(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.to(device, torch.float32).contiguous()

        levels = fixed_levels(side) if calibrated.levels is None else calibrated.levels
        self.levels = levels.to(device, torch.float32)
        edges = there(calibrated.edges)
        self._edges = self.levels if edges is None else edges
        self._table = None if side.axis == "channel" else Table(self._edges)
        self.scale, self.zero = there(calibrated.scale), there(calibrated.zero)
        self.rotation = there(hadamard_rotation(dim)) if side.rotated else None
        self._weight = there(calibrated.weight)
        self.mean, self.deviation = (
            None if values is None else values.view(heads, 1, dim)
            for values in (there(calibrated.mean), there(calibrated.deviation))
        )

    @property
    def has_storage_basis(self) -> bool:
        """Whether what is stored is in another basis than the model's."""
        return self.rotation is not None or self.mean is not None

    def to_storage_basis(self, x: Tensor) -> Tensor:
        """Numbers (rows, heads, tokens, dim) of the model in the basis that is stored, fp32."""
        if self.rotation is not None:
            return x.float() @ self.rotation.mT
        if self.mean is None or self.deviation is None:
            return x.float()
        return (x.float() - self.mean) / self.deviation

    def from_storage_basis(self, x: Tensor) -> Tensor:
        """The inverse of `to_storage_basis`; also of what attention sums, as its weights add up to 1."""
        if self.rotation is not None:
            return x.float() @ self.rotation
        if self.mean is None or self.deviation is None:
            return x.float()
        return x.float() * self.deviation + self.mean

    def encode(self, x: Tensor) -> EncodedPages:
        """Numbers (rows, tokens, channels), tokens a multiple of 32, already turned."""
        pages = x.float().unflatten(1, (-1, PAGE))
        scale, zero = self._ranges(pages)
        wide_scale, wide_zero = self._wide(scale), self._wide(zero)
        codes = self._codes(_normal(pages, wide_scale, wide_zero))
        own_scale, own_zero = (None, None) if self.side.is_fixed else (scale, zero)
        if not self.outliers:
            return EncodedPages(codes, own_scale, own_zero)
        apart = pages - self._dense(codes, wide_scale, wide_zero)
        felt = apart.abs() if self._weight is None else apart.abs() * self._weight
        index = felt.topk(self.outliers, -1).indices
        return EncodedPages(codes, own_scale, own_zero, apart.gather(-1, index).to(torch.float16).float(), index)

    def normalized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers (rows, tokens, channels) as levels see them, and their scales, of the same shape."""
        pages = x.float().unflatten(1, (-1, PAGE))
        scale, zero = (self._wide(values) for values in self._ranges(pages))
        normal = _normal(pages, scale, zero)
        assert scale is not None
        return normal.flatten(1, 2), scale.expand(pages.shape).flatten(1, 2)

    def decode(self, coded: EncodedPages) -> Tensor:
        """Numbers (rows, tokens, channels), fp32, still turned."""
        scale, zero = (self.scale, self.zero) if self.side.is_fixed else (coded.scale, coded.zero)
        x = self._dense(coded.codes, self._wide(scale), self._wide(zero))
        if coded.outlier_value is not None and coded.outlier_index is not None:
            x = x.scatter_add(-1, coded.outlier_index, coded.outlier_value)
        return x.flatten(1, 2)

    def _codes(self, normal: Tensor) -> Tensor:
        if self.side.levels == "uniform":
            return normal.round_().clamp_(0, (1 << self.side.bits) - 1).to(torch.uint8)
        if self._table is not None:
            return self._table.codes(normal)
        codes = torch.zeros(normal.shape, dtype=torch.uint8, device=normal.device)
        for edge in self.channel_edges.T:  # few, and each for all channels at once
            codes += (normal > edge).view(torch.uint8)
        return codes

    @property
    def channel_edges(self) -> Tensor:
        """Of axis "channel": what lies above i of a channel's edges (channels, 2**bits - 1) has code i."""
        return (self._edges[:, 1:] + self._edges[:, :-1]) / 2

    def _ranges(self, pages: Tensor) -> tuple[Tensor | None, Tensor | None]:
        side = self.side
        if side.axis == "channel":
            return None, None
        if side.axis == "static":
            assert self.scale is not None
            return self.scale, self.zero
        if side.axis == "page":
            return affine(pages.amin(2), pages.amax(2), side)
        groups = pages.unflatten(-1, (self.groups, -1))
        if side.levels == "normal":
            scale = groups.square().mean(-1).sqrt().clamp(2.0**-24, 65504)
            return scale.to(torch.float16).float(), None
        cut = 0 if self.groups > 1 else self.outliers
        low, high = _within(groups, cut // 2), _within(groups.neg(), cut - cut // 2).neg()
        return affine(low, high, side)

    def _wide(self, values: Tensor | None) -> Tensor | None:
        """Scales or zeros so that they go with pages (rows, pages, 32, channels)."""
        if values is None or self.side.is_fixed:
            return values
        if self.side.axis == "page":
            return values[:, :, None]
        return values.repeat_interleave(self.channels // self.groups, -1) if self.groups > 1 else values

    def _dense(self, codes: Tensor, scale: Tensor | None, zero: Tensor | None) -> Tensor:
        x = codes.float() if self.side.levels == "uniform" else self._at(codes)
        if self.side.axis == "channel":
            return x
        assert scale is not None
        x *= scale
        return x if zero is None else x.add_(zero)

    def _at(self, codes: Tensor) -> Tensor:
        """The levels that codes (rows, pages, 32, channels) stand for."""
        index = codes.int()
        if self.side.axis == "channel":
            count = self.levels.shape[1]
            index = index + torch.arange(self.channels, dtype=torch.int32, device=codes.device) * count
        return self.levels.flatten().index_select(0, index.flatten()).view(codes.shape)


def _normal(pages: Tensor, scale: Tensor | None, zero: Tensor | None) -> Tensor:
    if scale is None:
        return pages
    return pages / scale if zero is None else (pages - zero) / scale


def _within(groups: Tensor, cut: int) -> Tensor:
    """The least number of the last axis once the `cut` least are left out."""
    if not cut:
        return groups.amin(-1)
    return groups.topk(cut + 1, -1, largest=False).values[..., -1]


def hadamard_rotation(dim: int) -> Tensor:
    """The orthogonal Hadamard matrix (dim, dim). Raises RecipeError where none is known."""
    base = dim
    while (matrix := hadamard(base)) is None and base % 2 == 0:
        base //= 2
    doubled = hadamard(dim // base)
    if matrix is None or doubled is None:
        raise RecipeError(
            f"No Hadamard matrix of order {dim} is known here, and heads have {dim}; use another method."
        )
    return torch.kron(doubled, matrix) / dim**0.5
