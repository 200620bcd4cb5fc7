"""The Cholesky factor of the damped inverse Gram matrix, which error feedback needs."""

from __future__ import annotations

import torch
from torch import Tensor

from bitmill.errors import NumericsError

_ATTEMPTS = 12


def inverse_factor(gram: Tensor, damp: float) -> tuple[Tensor, float]:
    """Return upper-triangular U with (gram + d*mean(diag(gram))*I)^-1 = U^T U, and the d that was used.

    The arithmetic is fp64: an ill-conditioned Gram matrix loses all its digits in fp32.
    Source: GPTQ (Frantar et al. 2022), section 3.3, step 3.

    Args:
        gram: (width, width), symmetric, positive semi-definite up to rounding.
        damp: tried first; it grows tenfold while the factorization fails.

    Returns:
        U fp32 (width, width), and d.

    Raises:
        NumericsError: when the Gram matrix holds NaN or Inf, or a damping of 1e3 times the mean does not help.
    """
    if not bool(torch.isfinite(gram).all()):
        raise NumericsError(
            "The input statistics hold NaN or Inf, so they cannot be factorized: check the calibration text and "
            "the weights of the layers before this one."
        )
    mean = float(gram.diagonal().to(torch.float64).mean())
    used = damp
    for _ in range(_ATTEMPTS):
        # With the order of the columns reversed, the lower factor becomes an upper one: damped = R R^T,
        # so damped^-1 = R^-T R^-1 and U = R^-1. One factorization, and no inverse to square the condition.
        # No more than two fp64 matrices are alive at a time: for wide layers they are the largest of all.
        reversed_gram = gram.flip(0, 1).to(torch.float64)
        reversed_gram.diagonal().add_(used * mean)
        reversed_lower, info = torch.linalg.cholesky_ex(reversed_gram)
        del reversed_gram
        if int(info) == 0:
            R = reversed_lower.flip(0, 1)
            del reversed_lower
            U = torch.eye(R.shape[0], dtype=R.dtype, device=R.device).mT  # column-major, so solved in place
            torch.linalg.solve_triangular(R, U, upper=True, out=U)
            del R
            if bool(torch.isfinite(U.sum())):
                return U.to(torch.float32), used
        used = max(used * 10, 1e-6)
        if used > 1e3:
            break
    raise NumericsError(
        f"The input statistics cannot be factorized (mean diagonal {mean:.3g}, damping tried up to {used:.3g}): "
        "give it more calibration text, or raise the option damp."
    )
