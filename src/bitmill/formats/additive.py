"""Additive: blocks of eight columns as a scale times a sum of vectors from learned codebooks.

    code       unsigned, `bits` bits, an index into one codebook; `codebooks` of them a block
    codebooks  fp16 (codebooks, 2**bits, 8), one set for the matrix
    scale      fp16, one a row by default

Bits a weight: codebooks * bits / 8, and 128 * codebooks * 2**bits / (rows * columns) + 16/columns. The codebooks
are the cost of small matrices: two of 256 vectors are 0.07 bits a weight of a 1536 x 576 matrix and 0.6 of a
192 x 576 one, three of 64 vectors a quarter bit of codes more and three eighths of that.

Solvers that support `learned_codebooks` fit them to the output error; `fit` alone is residual k-means, followed
with `search` by alternating nearest codes and least squares.

Source: AQLM (Egiazarian et al. 2024, arXiv 2401.06118), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.formats.base import FORMATS, GroupFormat, Params, Rounder
from bitmill.formats.fitting import as_stored, divide_or_zero
from bitmill.formats.part import Part
from bitmill.numerics import additive
from bitmill.numerics.grouping import GroupSize

_ROUNDS = 20  # of k-means
_TURNS = 3  # of nearest codes and least squares
_STEPS = 8  # of conjugate gradients
_SAMPLE = 1 << 14  # vectors that the codebooks are fitted to, and 32 for each of theirs


@FORMATS.register("additive")
@dataclass(frozen=True)
class Additive(GroupFormat):
    """Sums of `codebooks` vectors, with codes of `bits` bits each; bits a weight: codebooks * bits / 8."""

    group_size: GroupSize = "row"
    codebooks: int = 2

    block: ClassVar[int] = 8
    groups_independent: ClassVar[bool] = False  # all groups and rows share the codebooks
    shareable: ClassVar[frozenset[str]] = frozenset({"codebooks"})
    learned_codebooks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.codebooks <= 8:
            raise RecipeError(f"codebooks is {self.codebooks!r}; use 1 to 8.")

    @property
    def codes_per_block(self) -> int:
        """One code in each codebook."""
        return self.codebooks

    @property
    def stackable(self) -> bool:
        """False: every matrix has codebooks of its own."""
        return False

    # -- choosing -----------------------------------------------------------------------------------------

    def fit(self, x: Tensor, importance: Tensor, search: bool = True) -> Params:
        """Fit scales to unit RMS and codebooks by residual k-means; `search` then alternates with least squares.

        Returns:
            "codebooks" (1, 1, codebooks, 2**bits, 8) and "scale" (rows, groups).
        """
        scale = _rms(x, importance)
        vectors, weight = self._vectors(x, importance, scale)
        books = additive.residual_kmeans(vectors, weight, self.codebooks, 1 << self.bits, _ROUNDS)
        params = {"codebooks": _on_grid(books)[None, None], "scale": scale}
        return self._improve(params, vectors, weight) if search else params

    def fit_group(self, x: Tensor, importance: Tensor, params: Params) -> Params:
        """Fit a scale alone: all groups share the codebooks.

        Returns:
            `params` with a new "scale" (rows, groups).
        """
        return {**params, "scale": _rms(x, importance)}

    def refit(self, x: Tensor, codes: Tensor, importance: Tensor, params: Params) -> Params:
        """Refit the codebooks and then the scales by weighted least squares, where they lower the error."""
        flat, weight = self._flat(codes), importance.expand(x.shape).reshape(-1, self.block)
        target, books = x.reshape(-1, self.block), params["codebooks"][0, 0]
        scale = self._spread(params["scale"], x)
        error = target - scale * additive.decode(flat, books)
        books = additive.refit(error, flat, books, scale, lambda e: e * weight, weight, _STEPS)
        params = self._better(x, codes, importance, params, {**params, "codebooks": _on_grid(books)[None, None]})
        unit = self.decode(codes, {**params, "scale": torch.ones_like(params["scale"])})
        power = (unit.square() * importance).sum(-1)
        best = as_stored((unit * x * importance).sum(-1) / power.clamp(min=1e-30))
        fitted = {**params, "scale": torch.where(best > 0, best, params["scale"])}
        return self._better(x, codes, importance, params, fitted)

    def _improve(self, params: Params, vectors: Tensor, weight: Tensor) -> Params:
        """Alternate nearest codes and least squares on some vectors; keep the codebooks that suit them best."""
        books = kept = params["codebooks"][0, 0]
        eye = torch.eye(self.block, device=books.device)
        one, least = torch.ones_like(vectors[:, :1]), None
        for turn in range(_TURNS + 1):
            codes, points = additive.search(vectors, eye, books, 1 << self.bits)
            error = vectors - points
            total = float((error.double().square() * weight).sum())
            if least is None or total < least:
                least, kept = total, books
            if turn < _TURNS:
                books = additive.refit(error, codes, books, one, lambda e: e * weight, weight, _STEPS)
                books = _on_grid(books)
        return {**params, "codebooks": kept[None, None]}

    def _vectors(self, x: Tensor, importance: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return blocks in units of their scale and the weights of their errors: a sample of those with weight."""
        weight = (importance * scale.square()[..., None]).reshape(-1, self.block)
        vectors = divide_or_zero(x, scale[..., None]).reshape(-1, self.block)
        counts = weight.sum(1) > 0
        if bool(counts.any()):
            vectors, weight = vectors[counts], weight[counts]
        step = max(1, vectors.shape[0] // max(_SAMPLE, 32 << self.bits))
        weight = weight[::step] / weight.mean().clamp(min=1e-30)
        return vectors[::step], weight

    def _better(self, x: Tensor, codes: Tensor, importance: Tensor, old: Params, new: Params) -> Params:
        """Return the params of less weighted error."""
        errors = [((x - self.decode(codes, p)).double().square() * importance).sum() for p in (new, old)]
        return new if bool(errors[0] < errors[1]) else old

    # -- meaning ------------------------------------------------------------------------------------------

    def nearest(self, x: Tensor, params: Params) -> Tensor:
        """Return the closest sums: exact for one or two codebooks, by a beam of 2**bits hypotheses for more.

        Returns:
            Codes uint8 (rows, groups, width / 8 * codebooks).
        """
        vectors = divide_or_zero(x, params["scale"][..., None]).reshape(-1, self.block)
        return self._encode(vectors, params)[0].reshape(*x.shape[:2], -1)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Return scale * sum of vectors; gradients reach both.

        Returns:
            fp32 (rows, groups, width).
        """
        points = additive.decode(self._flat(codes), params["codebooks"][0, 0])
        return points.reshape(*codes.shape[:2], -1) * params["scale"][..., None]

    def rounder(self, params: Params) -> Rounder:
        """Return a function that finds the closest sums for one block of columns."""
        scale = params["scale"][:, 0, None]

        def block(w: Tensor) -> tuple[Tensor, Tensor]:
            codes, points = self._encode(divide_or_zero(w, scale), params)
            return codes, points * scale

        return block

    def _encode(self, vectors: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """Search in fp64: many sums are close together, and |u|^2 - 2 u x in fp32 could not distinguish them."""
        books = params["codebooks"][0, 0]
        eye = torch.eye(self.block, dtype=torch.float64, device=vectors.device)
        codes, _ = additive.search(vectors.double(), eye, books.double(), 1 << self.bits)
        return codes.to(torch.uint8), additive.decode(codes, books)

    def _flat(self, codes: Tensor) -> Tensor:
        return codes.reshape(-1, self.codebooks)

    def _spread(self, scale: Tensor, x: Tensor) -> Tensor:
        """Expand scales of groups (rows, groups) to those of their vectors, (n, 1)."""
        return scale.repeat_interleave(x.shape[-1] // self.block, dim=-1).reshape(-1, 1)

    # -- storage ------------------------------------------------------------------------------------------

    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Return fp16 codebooks and scales."""
        books = (1, 1, self.codebooks, 1 << self.bits, self.block)
        return Part("codebooks", books), Part("scale", self.grid(shape))


def _on_grid(books: Tensor) -> Tensor:
    """Round to fp16 and to steps of 2**-12 of the unit: every sum is then exact in fp32, and reproducible."""
    return as_stored((books * 4096).round() / 4096)


def _rms(x: Tensor, importance: Tensor) -> Tensor:
    """Return the root mean square of the numbers with weight in every group, (rows, groups), as stored."""
    counts = (importance > 0).to(x.dtype)
    counts = torch.where(counts.sum(-1, keepdim=True) > 0, counts, 1.0)
    return as_stored(((x.square() * counts).sum(-1) / counts.sum(-1)).sqrt())
