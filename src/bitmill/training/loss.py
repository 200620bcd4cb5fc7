"""Losses of next-token distributions, with their gradients in closed form.

    kl          KL(teacher || student)     gradient of the student's logits: p - q
    next-token  -log p of the next token   gradient of the student's logits: p - onehot

p and q are the distributions of student and teacher. Logits over 262,144 words are large, and so are the
temporaries that automatic differentiation would keep of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

LossName = Literal["kl", "next-token"]

_LOGITS = 1 << 23  # of a model that are in memory at a time: in fp32 34 MB
_LEAST_POSITIONS = 16


def positions_at_a_time(length: int, vocabulary: int) -> Iterator[slice]:
    """Yield consecutive slices of the positions of a window, of which the logits are computed together.

    Args:
        length: tokens of the window.
        vocabulary: words of the model.
    """
    step = max(_LEAST_POSITIONS, _LOGITS // vocabulary)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def kl_divergence(logits: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of KL(teacher || student) over positions, and its gradient.

    Args:
        logits: (n, vocabulary) of the student.
        expected: (n, vocabulary) of the teacher.

    Returns:
        A scalar in nats, and the gradient of `logits`.
    """
    log_p = torch.log_softmax(logits.float(), -1)
    log_q = torch.log_softmax(expected.to(log_p.device).float(), -1)
    q = log_q.exp()
    divergence = log_q.sub_(log_p).mul_(q).masked_fill_(q == 0, 0.0).sum(dtype=torch.float64)
    return divergence, log_p.exp_().sub_(q)


def cross_entropy(logits: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the next-token losses over positions, and its gradient.

    Args:
        logits: (n, vocabulary) of the student.
        following: (n,) the tokens that follow, or (n - 1,) at the end of a window.

    Returns:
        A scalar in nats, and the gradient of `logits`, 0 at a position that nothing follows.
    """
    log_p = torch.log_softmax(logits.float(), -1)
    rows = torch.arange(following.numel(), device=log_p.device)
    loss = -log_p[rows, following].sum(dtype=torch.float64)
    gradient = log_p.exp_()
    gradient[rows, following] -= 1
    gradient[following.numel() :] = 0
    return loss, gradient
