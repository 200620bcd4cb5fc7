"""U^T U is the inverse of the damped Gram, in single precision as good as double allows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitmill.errors import NumericsError
from bitmill.numerics.cholesky import inverse_factor


def positive(width: int, tokens: int) -> torch.Tensor:
    X = torch.randn(tokens, width)
    return X.T @ X / tokens


def damped(gram: torch.Tensor, damp: float) -> torch.Tensor:
    gram = gram.double()
    return gram + damp * gram.diagonal().mean() * torch.eye(gram.shape[0], dtype=torch.float64)


@given(
    st.integers(1, 40), st.integers(1, 80), st.sampled_from([0.01, 0.1, 1.0]), st.sampled_from([1e-8, 1.0, 1e8])
)
def test_factors_inverse(width, tokens, damp, loudness):
    gram = positive(width, tokens) * loudness
    U, used = inverse_factor(gram, damp)
    assert used == damp
    assert torch.equal(U, U.triu())
    assert (U.diagonal() > 0).all()
    product = U.double().T @ U.double() @ damped(gram, damp)
    assert torch.allclose(product, torch.eye(width, dtype=torch.float64), atol=1e-3)


def test_equals_textbook_method():
    gram = positive(30, 100)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped(gram, 0.01)), upper=True)
    assert torch.allclose(inverse_factor(gram, 0.01)[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_gram_unmodified():
    gram = positive(5, 10)
    before = gram.clone()
    inverse_factor(gram, 0.01)
    assert torch.equal(gram, before)


def test_damping_grows():
    gram = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.3]))
    U, used = inverse_factor(gram, 0.01)
    assert used == pytest.approx(1.0)  # 0.01 and 0.1 of the mean, 0.675, do not lift -0.3
    assert torch.isfinite(U).all()


def test_zero_damping_raised():
    gram = torch.ones(3, 3)  # rank one
    _, used = inverse_factor(gram, 0.0)
    assert used > 0


def test_indefinite_matrix_refused():
    with pytest.raises(NumericsError, match="damping tried up to"):
        inverse_factor(-torch.eye(4), 0.01)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0), (1, 3)])
def test_nonfinite_refused(bad, place):
    gram = positive(4, 10)
    gram[place] = bad
    with pytest.raises(NumericsError, match="NaN or Inf"):
        inverse_factor(gram, 0.01)
