"""Quantiles of the Beta distribution.

What a part of a random direction weighs: of a vector that is uniform on a sphere in n dimensions, the squared
norm of d coordinates is Beta(d/2, (n-d)/2).
"""

from __future__ import annotations

from math import exp, lgamma, log, log1p


def beta_quantile(p: float, a: float, b: float) -> float:
    """The x with P(Beta(a, b) <= x) = p, by halving to the last digit; p in (0, 1), a and b positive."""
    low, high = 0.0, 1.0
    while True:
        x = (low + high) / 2
        if not low < x < high:
            return x
        if _below(x, a, b) < p:
            low = x
        else:
            high = x


def _below(x: float, a: float, b: float) -> float:
    """P(Beta(a, b) <= x), the regularized incomplete beta function.

    Continued fraction by Lentz's method, DLMF 8.17.22; it converges fast left of the mean.
    """
    if x > (a + 1) / (a + b + 2):
        return 1 - _below(1 - x, b, a)
    if x <= 0:
        return 0.0
    front = exp(a * log(x) + b * log1p(-x) + lgamma(a + b) - lgamma(a) - lgamma(b)) / a
    tiny = 1e-300
    fraction, c, d = 1.0, 1.0, 0.0
    for m in range(1000):
        even = m // 2
        if m == 0:
            term = 1.0
        elif m % 2:
            term = -(a + even) * (a + b + even) * x / ((a + 2 * even) * (a + 2 * even + 1))
        else:
            term = even * (b - even) * x / ((a + 2 * even - 1) * (a + 2 * even))
        d = 1 / ((1 + term * d) or tiny)
        c = (1 + term / c) or tiny
        fraction *= c * d
        if abs(1 - c * d) < 1e-15:
            break
    return front * (fraction - 1)
