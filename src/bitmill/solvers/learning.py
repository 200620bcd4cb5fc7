"""Codebooks that all layers of a kind share, learned from samples of their float weights.

Sample    of every layer some blocks of columns and some rows, each row in units of its scale, and of every block
          the metric of errors that later blocks cannot absorb, (U_BB^T U_BB)^-1 as in `feedback`
Weight    that of the squared scale, over the mean energy of a row's output: layers count by relative errors
Learn     residual k-means, then in turns beam search of all samples in their own metrics, and least squares

The sampled weights lack the corrections that error feedback would make to them, which depend on codes that are
not chosen yet. All samples together take a MB or two, independent of the size of the layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitmill.formats import GroupFormat, Params
from bitmill.formats.fitting import as_stored
from bitmill.formats.quantized import fit_with_shared
from bitmill.numerics import additive
from bitmill.numerics.cholesky import inverse_factor
from bitmill.numerics.statistics import Statistics
from bitmill.solvers.base import Learner
from bitmill.solvers.feedback import zero_dead_inputs

_SAMPLE = 1 << 15  # blocks of weights of all layers together, and 32 for each vector to be learned
_PLACES = 16  # blocks of columns of a layer
_ROUNDS = 20  # of k-means
_STEPS = 8  # of conjugate gradients


@dataclass(frozen=True)
class _Sample:
    """Samples of one layer.

    vectors: (places, rows, block).  weight: (places, rows), of their errors.  metric: (places, block, block).
    """

    vectors: Tensor
    weight: Tensor
    metric: Tensor

    @property
    def diagonal(self) -> Tensor:
        """The weight of a squared error in each coordinate, (places, rows, block)."""
        return self.weight[..., None] * self.metric.diagonal(dim1=1, dim2=2)[:, None]


class CodebookLearner(Learner):
    """Learns `codebooks` for a format that has them.

    layers: how many there are.  beam, rounds, damp: as of `beam_search`.
    """

    def __init__(self, format: GroupFormat, layers: int, beam: int, rounds: int, damp: float) -> None:
        self.format, self.beam, self.rounds, self.damp = format, beam, rounds, damp
        self.count = -(-max(_SAMPLE, 32 << format.code_bits) // layers)  # of a layer
        self.samples: list[_Sample] = []

    def add_layer(self, W: Tensor, stats: Statistics) -> None:
        """Keep samples of a layer.

        Raises:
            NumericsError: when there is no Gram matrix, or it cannot be factorized.
        """
        W, gram, dead = zero_dead_inputs(W, stats.required_gram("Learning codebooks"))
        energy = float(((W @ gram) * W).sum() / max(W.shape[0], 1))
        if energy <= 0:
            return
        U, _ = inverse_factor(gram, self.damp)
        draw = torch.Generator().manual_seed(len(self.samples))
        block = self.format.block
        total = -(-W.shape[1] // block)
        places = torch.randperm(total, generator=draw)[:_PLACES].to(W.device)
        rows = torch.randperm(W.shape[0], generator=draw)[: -(-self.count // len(places))].to(W.device)
        scale = self._scales(W, rows, (~dead).to(W.dtype))[places]
        units = torch.nn.functional.pad(W[rows], (0, -W.shape[1] % block)).unflatten(1, (-1, block))
        vectors = units.transpose(0, 1)[places] / torch.where(scale > 0, scale, 1.0)[..., None]
        self.samples.append(_Sample(vectors, scale.square() / energy, _metrics(U, block)[places]))

    def _scales(self, W: Tensor, rows: Tensor, live: Tensor) -> Tensor:
        """Return the scales (blocks of columns, rows) that the format gives to some rows."""
        scale = fit_with_shared(self.format, W, live, {})["scale"]
        first = torch.arange(0, W.shape[1], self.format.block, device=W.device)
        group = (first // self.format.width((W.shape[0], W.shape[1]))).clamp(max=scale.shape[1] - 1)
        return scale.expand(W.shape[0], -1)[rows][:, group].T

    def learn(self) -> Params:
        """Return codebooks of least weighted error of all samples together."""
        books, size = self.format.codes_per_block, 1 << self.format.code_bits
        if not self.samples:  # no weight is other than 0, and every code means 0
            return {"codebooks": torch.zeros(1, 1, books, size, self.format.block)}
        vectors = self._flat([s.vectors for s in self.samples])
        diagonal = self._flat([s.diagonal for s in self.samples])
        unit = diagonal.mean().clamp(min=1e-30)
        codebooks = additive.residual_kmeans(vectors, diagonal / unit, books, size, _ROUNDS)
        one = torch.ones_like(vectors[:, :1])
        for _ in range(self.rounds):
            codes = self._search(codebooks)
            error = vectors - additive.decode(codes, codebooks)
            codebooks = additive.refit(error, codes, codebooks, one, self._weigh, diagonal, _STEPS)
        return {"codebooks": as_stored(codebooks)[None, None]}

    def _search(self, codebooks: Tensor) -> Tensor:
        """Return the codes of all samples, each searched in the metric of its place."""
        found = [
            additive.search(vectors @ metric, metric, codebooks, self.beam)[0]
            for sample in self.samples
            for vectors, metric in zip(sample.vectors, sample.metric)
        ]
        return torch.cat(found)

    def _weigh(self, error: Tensor) -> Tensor:
        """Multiply errors of all samples (n, block) by their metrics and weights."""
        sizes = [sample.weight.numel() for sample in self.samples]
        pieces = [
            (piece.reshape(sample.vectors.shape) @ sample.metric) * sample.weight[..., None]
            for sample, piece in zip(self.samples, error.split(sizes))
        ]
        return self._flat(pieces)

    def _flat(self, pieces: list[Tensor]) -> Tensor:
        return torch.cat([piece.reshape(-1, self.format.block) for piece in pieces])


def _metrics(U: Tensor, block: int) -> Tensor:
    """Return (U_BB^T U_BB)^-1 of every block of columns, (blocks, block, block), zero beyond the last column."""
    columns = U.shape[0]
    missing = -columns % block
    padded = torch.nn.functional.pad(U, (0, missing, 0, missing))
    padded.diagonal()[columns:] = 1.0
    blocks = padded.unflatten(0, (-1, block)).unflatten(2, (-1, block)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    eye = torch.eye(block, dtype=torch.float64, device=U.device).expand(blocks.shape)
    inverse = torch.linalg.solve_triangular(blocks.double(), eye, upper=True)
    metrics = (inverse @ inverse.transpose(1, 2)).float()
    if missing:
        metrics[-1, block - missing :] = 0.0
        metrics[-1, :, block - missing :] = 0.0
    return metrics
