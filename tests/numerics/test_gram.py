"""The running Gram matrix equals X^T X / tokens, for any batches and width."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitmill.numerics.gram import RunningGram


def expected(X: torch.Tensor) -> torch.Tensor:
    X = X.double()
    return (X.T @ X / X.shape[0]).float()


@pytest.mark.parametrize("width", [1, 383, 384, 385, 769])
def test_ragged_batches(width):
    X = torch.randn(61, width) + 0.5
    gram = RunningGram(width)
    for batch in X.split([1, 7, 20, 33]):
        gram.add(batch)
    assert gram.tokens == 61
    assert torch.allclose(gram.mean(), expected(X), rtol=1e-4, atol=1e-5)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 12))
def test_batch_size_does_not_matter(batches, width):
    X = torch.randn(sum(batches), width)
    gram = RunningGram(width)
    for batch in X.split(batches):
        gram.add(batch)
    assert torch.allclose(gram.mean(), expected(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [3, 400])
def test_exactly_symmetric(width):
    gram = RunningGram(width)
    gram.add(torch.randn(50, width))
    mean = gram.mean()
    assert torch.equal(mean, mean.T)
    assert torch.equal(gram.mean(), mean)  # reading changes nothing


def test_half_precision_inputs():
    X = torch.full((4096, 2), 3.0, dtype=torch.bfloat16)  # a bfloat16 sum would stop growing at 256 * 9
    gram = RunningGram(2)
    for batch in X.split(64):
        gram.add(batch)
    assert torch.equal(gram.mean(), torch.full((2, 2), 9.0))


def test_no_tokens():
    assert torch.equal(RunningGram(3).mean(), torch.zeros(3, 3))
