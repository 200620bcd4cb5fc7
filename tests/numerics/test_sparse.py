"""Sparse entries: choosing, placing, and their least-squares values."""

import pytest
import torch

from bitmill.numerics import sparse
from bitmill.numerics.sparse import best_values, from_index, index_type, largest, places, to_index


@pytest.mark.parametrize("count", [0, 1, 7, 60])
def test_largest_count_is_exact(count):
    score = torch.randint(0, 5, (6, 10), generator=torch.Generator().manual_seed(0)).float()
    mask = largest(score, count)
    assert int(mask.sum()) == count
    order = score.flatten().argsort(descending=True, stable=True)[:count]
    assert mask.flatten()[order].all()  # of equal ones the first


@pytest.mark.parametrize("columns", [5, 40000, 65535, 65536, 100000])
def test_indices_round_trip(columns):
    numbers = torch.tensor([0, 1, columns // 2, columns - 1, columns])
    stored = to_index(numbers, columns)
    assert stored.dtype == index_type(columns) == (torch.int16 if columns <= 65535 else torch.int32)
    assert torch.equal(from_index(stored), numbers)


def test_positions_follow_mask():
    mask = torch.rand(9, 70, generator=torch.Generator().manual_seed(1)) < 0.1
    mask[3] = False
    rows, columns = places(to_index(mask.sum(1), 70), to_index(mask.nonzero()[:, 1], 70))
    assert torch.equal(torch.stack([rows, columns], 1), mask.nonzero())


@pytest.mark.parametrize("budget", [1, 500, 1 << 22])
def test_least_squares_values(budget, monkeypatch):
    monkeypatch.setattr(sparse, "_BUDGET", budget)
    draw = torch.Generator().manual_seed(0)
    X = torch.randn(300, 30, generator=draw) @ (torch.eye(30) + 0.2 * torch.randn(30, 30, generator=draw))
    gram, error = X.T @ X / 300, torch.randn(8, 30, generator=draw)
    mask = torch.rand(8, 30, generator=draw) < 0.2
    mask[2], mask[5] = False, True
    values = best_values(error, gram, mask, 1e-9)
    expected = torch.zeros(8, 30, dtype=torch.float64)
    for r in range(8):
        if mask[r].any():
            A, b = X[:, mask[r]].double(), X.double() @ error[r].double()
            expected[r, mask[r]] = torch.linalg.lstsq(A, b).solution
    torch.testing.assert_close(values.double(), expected[mask], rtol=1e-3, atol=1e-4)


def test_values_if_independent():
    error = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(4, 20, generator=torch.Generator().manual_seed(1)) < 0.3
    for gram, damp in ((torch.eye(20) * 3, 0.01), (torch.zeros(20, 20), 0.01), (torch.ones(20, 20), 1e9)):
        torch.testing.assert_close(best_values(error, gram, mask, damp), error[mask], rtol=1e-4, atol=1e-6)
