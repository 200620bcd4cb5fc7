"""Block feedback against its definition, and the codes that it returns."""

from __future__ import annotations

import pytest
import torch

from bitmill.formats.e8 import E8
from bitmill.formats.pyramid import Pyramid
from bitmill.formats.quantized import fit_matrix
from bitmill.numerics.cholesky import inverse_factor
from bitmill.solvers.feedback import StaticGrids, run_error_feedback, visiting_order
from helpers.cases import gram_of, inputs, weights


class Watched(StaticGrids):
    """Keeps what each block was when its turn came."""

    def rounder(self, column, Wt):
        self.seen = {**getattr(self, "seen", {}), column: Wt[column : column + 8].clone()}
        return super().rounder(column, Wt)


def test_equals_definition() -> None:
    """With errors E of the columns before, those to come are at W - E H_BR H_RR^-1, the best real numbers."""
    W, H = weights(5, 44), gram_of(inputs(columns=44)).double()
    H.diagonal().add_(0.1 * H.diagonal().mean())
    format = E8(2, "row")
    grids = Watched(format, fit_matrix(format, W, None, False), torch.zeros(44, dtype=torch.int64))
    U, _ = inverse_factor(H.float(), 0.0)
    values = W.T.contiguous()
    run_error_feedback(values, U, grids, format)
    for start in (8, 32, 40):  # within a chunk, at its end, and a ragged block
        error = (values[:start].T - W[:, :start]).double()
        best = W[:, start:].double() - error @ H[:start, start:] @ torch.linalg.inv(H[start:, start:])
        torch.testing.assert_close(grids.seen[start].T.double(), best[:, :8], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("format", [E8(2), E8(2, 40), Pyramid(2), Pyramid(3, 32)], ids=repr)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("columns", [96, 44, 7])
def test_codes_decode_to_feedback(format, act_order: bool, columns: int) -> None:
    W, gram = weights(6, columns), gram_of(inputs(columns=columns))
    order = visiting_order(gram.diagonal(), format.block, act_order)
    assert sorted(order.tolist()) == list(range(columns))
    params = fit_matrix(format, W, None, False)
    values = W.T[order].contiguous()
    U, _ = inverse_factor(gram[order][:, order], 0.1)
    codes = run_error_feedback(values, U, StaticGrids(format, params, order // format.width((6, columns))), format)
    assert codes.shape == (format.codes_in(columns), 6)
    natural = torch.empty_like(codes).unflatten(0, (-1, format.codes_per_block))
    natural[order[:: format.block] // format.block] = codes.unflatten(0, (-1, format.codes_per_block))
    decoded = format.dequantize(natural.flatten(0, 1).T, params, (6, columns))
    torch.testing.assert_close(decoded[:, order].T, values, rtol=1e-5, atol=1e-6)


def test_block_order() -> None:
    importance = torch.tensor([1.0, 1, 5, 5, 3, 3, 9])
    assert visiting_order(importance, 2, True).tolist() == [2, 3, 4, 5, 0, 1, 6]
    assert visiting_order(importance, 1, True).tolist() == [6, 2, 3, 4, 5, 0, 1]
    assert visiting_order(importance, 2, False).tolist() == list(range(7))
