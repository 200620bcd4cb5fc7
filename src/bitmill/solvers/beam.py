"""Beam search: codes, codebooks and scales of formats with learned codebooks, in the metric of the output.

Problem      minimise tr((W - W^) H (W - W^)^T), H the damped Gram matrix of the inputs
Search       a block of columns with everything else fixed is a small quadratic in its codes: its own part of H
             and a linear term; codebook by codebook, the `beam` best hypotheses of every row are kept
Start        residual k-means; then `rounds` times: code a sample of rows by error feedback, where a block is
             searched in the metric of what blocks to come cannot absorb, and refit the codebooks to the outcome
Alternate    least squares for codebooks and scales at fixed codes, by conjugate gradients in the metric of H,
             and a sweep that searches every block again; until a turn gains less than `tolerance`
Shared       codebooks that layers share are learned by `learning` beforehand; what is refitted is then the scales
Target       with `alpha`, W is first moved to answer errors of earlier layers, see `gptaq`
Cost         a sweep is rows * columns * beam * codebooks * K / 8 sums of the vectors' products, K vectors each

Egiazarian et al. 2024, "AQLM" (arXiv 2401.06118), section 3. There codes start from residual k-means alone, and
codebooks and scales are trained by Adam. Error feedback as a start, and least squares, are bitmill's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.formats import GroupFormat, Params
from bitmill.formats.base import Rounder
from bitmill.formats.fitting import as_stored
from bitmill.formats.quantized import Quantized, fit_matrix, fit_with_shared
from bitmill.numerics import additive
from bitmill.numerics.cholesky import inverse_factor
from bitmill.numerics.statistics import GRAM, Statistics
from bitmill.solvers.base import SOLVERS, Solver
from bitmill.solvers.descent import Descent
from bitmill.solvers.feedback import run_error_feedback, zero_dead_inputs
from bitmill.solvers.gptaq import corrected_target
from bitmill.solvers.learning import CodebookLearner

_SAMPLE = 1 << 13  # blocks coded in a round of training
_STEPS = 4  # of conjugate gradients


@SOLVERS.register("beam_search")
@dataclass(frozen=True)
class BeamSearch(Solver):
    """Alternate between beam search for the codes and least squares for the rest."""

    beam: int = 8
    sweeps: int = 4
    tolerance: float = 0.005
    rounds: int = 16
    damp: float = 0.05
    alpha: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beam < 1 or self.sweeps < 0 or self.rounds < 0 or not self.tolerance >= 0:
            raise RecipeError(
                f"beam is {self.beam!r}, sweeps {self.sweeps!r}, rounds {self.rounds!r} and tolerance "
                f"{self.tolerance!r}; use a beam of at least 1 and nothing negative."
            )
        if not 0 < self.damp < 100:
            raise RecipeError(f"damp is {self.damp!r}; use a positive share of the mean diagonal, such as 0.05.")
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"alpha is {self.alpha!r}; use a share of the correction from 0 to 1.")

    @property
    def needs(self) -> frozenset[str]:
        """The Gram matrix of the layer's inputs; with alpha, the cross-Gram with the float model's inputs too."""
        return GRAM | {"cross"} if self.alpha else GRAM

    def unsupported_reason(self, format: GroupFormat) -> str | None:
        """Return a reason for formats without learned codebooks."""
        if format.learned_codebooks:
            return None
        return f"beam_search searches sums of learned codebooks, and {format.name} has none; use gptq."

    def learner(self, format: GroupFormat, layers: int) -> CodebookLearner:
        """Return a learner of codebooks that uses this search and least squares on rows of all layers."""
        return CodebookLearner(format, layers, self.beam, self.rounds, self.damp)

    def target(self, W: Tensor, stats: Statistics) -> Tensor:
        """Return W corrected for the errors of earlier layers, with alpha.

        Raises:
            NumericsError: when alpha is positive and stats.cross is missing.
        """
        return corrected_target(W, stats, self.alpha, self.damp, self.name)

    def solve(self, W: Tensor, stats: Statistics, format: GroupFormat) -> Quantized:
        """Quantize W, fp32 (rows, columns), in the metric of stats.gram.

        Raises:
            NumericsError: when there is no Gram matrix, or it cannot be factorized.
        """
        W, gram, dead = zero_dead_inputs(W, stats.required_gram(self.name))
        U, damp = inverse_factor(gram, self.damp)
        H = gram.clone()
        H.diagonal().add_(damp * gram.diagonal().mean())
        importance = (1 / U.square().sum(0)).masked_fill(dead, 0.0)
        if stats.shared is None:
            state = _State(W, H, U, format, fit_matrix(format, W, importance, False), self.beam)
            self._train(state)
        else:
            shared = {name: value.to(W.device) for name, value in stats.shared.items()}
            params = fit_with_shared(format, W, importance, shared)
            state = _State(W, H, U, format, params, self.beam, frozen=True)
        state.code_blocks()
        error = state.refit()
        best = state.quantized()
        for _ in range(self.sweeps):
            state.sweep()
            before, error = error, state.refit()
            if error < before:  # what is stored is rounded, so that a turn can lose
                best = state.quantized()
            if error > before * (1 - self.tolerance):
                break
        return best

    def _train(self, state: _State) -> None:
        """Fit the codebooks to a few rows at a time, coded by error feedback."""
        rows = state.shape[0]
        count = min(rows, -(-_SAMPLE * state.format.codes_per_block // state.format.codes_in(state.shape[1])))
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).repeat(2)
        for turn in range(self.rounds):
            start = turn * count % rows
            part = state.some(order[start : start + count].to(state.W.device))
            part.code_blocks()
            part.refit_codebooks()
            state.params["codebooks"] = part.params["codebooks"]


class _State:
    """A matrix during the search: codes (rows, codes), params as stored.

    W (rows, columns), H (columns, columns), U as in `run_error_feedback`.  frozen: the codebooks are shared.
    """

    def __init__(
        self, W: Tensor, H: Tensor, U: Tensor, format: GroupFormat, params: Params, beam: int, frozen: bool = False
    ) -> None:
        self.W, self.H, self.U, self.format, self.params, self.beam = W, H, U, format, dict(params), beam
        self.frozen = frozen
        self.shape = (W.shape[0], W.shape[1])
        self.missing = -W.shape[1] % format.block  # columns of a ragged last block
        self.codes = torch.empty(0)

    def some(self, rows: Tensor) -> _State:
        """Select some of the rows."""
        params = {**self.params, "scale": self.params["scale"][rows if len(self.params["scale"]) > 1 else [0]]}
        return _State(self.W[rows], self.H, self.U, self.format, params, self.beam)

    def quantized(self) -> Quantized:
        """Return the present state; later ones replace its tensors and never change them in place."""
        return Quantized(self.format, self.codes.clone(), dict(self.params), self.shape)

    # -- codes --------------------------------------------------------------------------------------------

    def code_blocks(self) -> None:
        """Code all blocks in turn; those not yet coded absorb the error."""
        self.codes = run_error_feedback(self.W.T.contiguous(), self.U, self, self.format).T.contiguous()

    def stop(self, start: int, stop: int) -> int:
        """A chunk of `run_error_feedback` may end anywhere."""
        return stop

    def levels(self, start: int, stop: int, Wt: Tensor) -> tuple[None, Tensor]:
        """Return None: sums of codebooks are no tables of levels."""
        return None, torch.zeros(stop - start, dtype=torch.int32)

    def rounder(self, column: int, Wt: Tensor) -> Rounder:
        """Return a search in (U_BB^T U_BB)^-1, the metric of errors that later blocks cannot absorb.

        Args:
            column: the first of the block.
            Wt: unused.
        """
        U = self.U[column : column + self.format.block, column : column + self.format.block].double()
        inverse = torch.linalg.solve_triangular(U, torch.eye(len(U), device=U.device).double(), upper=True)
        metric = self._whole((inverse @ inverse.T).float())

        def block(w: Tensor) -> tuple[Tensor, Tensor]:
            return self.search(column, w @ metric, metric)

        return block

    def search(self, column: int, pull: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
        """Find codes of low v metric v - 2 v pull for a block.

        Args:
            column: the first of the block.
            pull: (rows, block).
            metric: (block, block).

        Returns:
            Codes (rows, M) and values v (rows, block).
        """
        scale = self.scale_at(column)
        over = torch.where(scale > 0, 1 / torch.where(scale > 0, scale, 1.0), 0.0)
        codes, points = additive.search(pull * over, metric, self.params["codebooks"][0, 0], self.beam)
        return codes.to(torch.uint8), points * scale

    def sweep(self) -> None:
        """Search every block again, given all others."""
        descent = _Sweep(self)
        descent.columns_pass(torch.arange(self.shape[1]))
        self.codes = descent.codes.T.contiguous()

    # -- parameters ---------------------------------------------------------------------------------------

    def refit(self) -> float:
        """Refit codebooks, then scales; return the objective."""
        if not self.frozen:
            self.refit_codebooks()
        return self._refit_scales()

    def refit_codebooks(self) -> None:
        """Refit the codebooks by least squares in the metric of H."""
        blocks, diagonal = self._blocks(self.W - self._decoded()), self._blocks(self.H.diagonal()[None])
        codes = self.codes.reshape(-1, self.format.codes_per_block)
        starts = range(0, self.shape[1], self.format.block)
        scale = torch.stack([self.scale_at(j).expand(self.shape[0], 1) for j in starts], 1).reshape(-1, 1)

        def apply_metric(e: Tensor) -> Tensor:
            return self._blocks(e.reshape(self.shape[0], -1)[:, : self.shape[1]] @ self.H)

        books = self.params["codebooks"]
        fitted = additive.refit(
            blocks, codes, books[0, 0], scale, apply_metric, diagonal.repeat(self.shape[0], 1), _STEPS
        )
        self.params["codebooks"] = as_stored(fitted)[None, None]

    def _refit_scales(self) -> float:
        """Refit the scales by least squares, one group of columns after the other; return the objective."""
        scale, width = self.params["scale"].clone(), self.format.width(self.shape)
        if len(scale) < self.shape[0]:
            width = self.shape[1]
        Q = self._decoded()
        gradient = (self.W - Q) @ self.H
        for group in range(scale.shape[1]):
            cut, old = slice(group * width, (group + 1) * width), scale[:, group : group + 1]
            unit = Q[:, cut] / torch.where(old > 0, old, 1.0)
            ahead, bend = (gradient[:, cut] * unit).sum(1), ((unit @ self.H[cut, cut]) * unit).sum(1)
            if len(scale) == 1:
                ahead, bend = ahead.sum(0, keepdim=True), bend.sum(0, keepdim=True)
            new = as_stored(old + (ahead / bend.clamp(min=1e-30))[:, None])
            new = torch.where((new > 0) & (old > 0), new, old)
            gradient.addmm_((old - new) * unit, self.H[cut])
            Q[:, cut] = new * unit
            scale[:, group : group + 1] = new
        self.params["scale"] = scale
        return float(((self.W - Q) * gradient).sum(dtype=torch.float64))

    # -- views --------------------------------------------------------------------------------------------

    def scale_at(self, column: int) -> Tensor:
        """Return the scales (rows, 1) of the block at `column`."""
        scale = self.params["scale"]
        group = min(column // self.format.width(self.shape), scale.shape[1] - 1)
        return scale[:, group : group + 1]

    def _decoded(self) -> Tensor:
        return self.format.dequantize(self.codes, self.params, self.shape)

    def _blocks(self, x: Tensor) -> Tensor:
        """View (rows, columns) as blocks (n, block), padded with zeros."""
        return torch.nn.functional.pad(x, (0, self.missing)).reshape(-1, self.format.block)

    def _whole(self, metric: Tensor) -> Tensor:
        """Pad the metric of a ragged block with zeros to that of a whole one."""
        missing = self.format.block - len(metric)
        return torch.nn.functional.pad(metric, (0, missing, 0, missing))


class _Sweep(Descent):
    """Coordinate descent whose steps search the codes of a block in the block's own metric."""

    def __init__(self, state: _State) -> None:
        Q, width = state._decoded(), state.format.width(state.shape)
        codes = state.codes.T.contiguous()
        super().__init__(state.W.T, Q.T.contiguous(), codes, state.H, state.format, state.params, width)
        self._state = state

    def _block_step(self, first: int, rounder: Rounder) -> None:
        cut = slice(first, min(first + self.format.block, self.Q.shape[0]))
        metric = self.H[cut, cut]
        pull = torch.nn.functional.pad(
            (self.gradient[cut] + metric @ self.Q[cut]).T, (0, first + self.format.block - cut.stop)
        )
        codes, values = self._state.search(first, pull, self._state._whole(metric))
        self._take(cut, codes.T, values.T[: len(metric)])
