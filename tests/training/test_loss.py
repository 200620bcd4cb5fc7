"""Losses and their gradients against automatic differentiation."""

from __future__ import annotations

import pytest
import torch

from bitmill.training.loss import cross_entropy, kl_divergence, positions_at_a_time


def test_kl_divergence_and_its_gradient():
    logits = torch.randn(5, 11, requires_grad=True)
    expected = torch.randn(5, 11)
    expected[0, 3] = -torch.inf  # a word that the teacher excludes
    target = torch.log_softmax(expected, -1)
    reference = torch.nn.functional.kl_div(torch.log_softmax(logits, -1), target.exp(), reduction="sum")
    reference.backward()
    value, gradient = kl_divergence(logits.detach(), expected)
    assert float(value) == pytest.approx(reference.item(), rel=1e-5)
    torch.testing.assert_close(gradient, logits.grad)


def test_cross_entropy_and_its_gradient_at_the_end_of_a_window():
    logits = torch.randn(5, 11, requires_grad=True)
    following = torch.tensor([1, 0, 10, 4])
    reference = torch.nn.functional.cross_entropy(logits[:4], following, reduction="sum")
    reference.backward()
    value, gradient = cross_entropy(logits.detach(), following)
    assert float(value) == pytest.approx(reference.item(), rel=1e-5)
    torch.testing.assert_close(gradient, logits.grad)


def test_positions_cover_the_window_in_pieces_that_fit_large_vocabularies():
    for vocabulary in (100, 262_144):
        pieces = list(positions_at_a_time(200, vocabulary))
        assert [k for piece in pieces for k in range(piece.start, piece.stop)] == list(range(200))
        assert all((piece.stop - piece.start) * vocabulary <= 1 << 23 for piece in pieces)
