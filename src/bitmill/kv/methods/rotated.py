"""Hadamard rotation and the levels that are best for a normal distribution."""

from __future__ import annotations

from dataclasses import dataclass

from bitmill.config.options import option
from bitmill.kv.scheme import KV_METHODS, KVMethod, Scheme, TensorScheme


@KV_METHODS.register("rotated")
@dataclass(frozen=True)
class Rotated(KVMethod):
    """Turn every head by a Hadamard matrix; then its numbers are nearly normal, and Lloyd-Max levels fit.

    Problem    a few large channels spoil the scale of a token
    Equation   x^ = H^T (s L[code]), s the root mean square of the head's numbers, L Lloyd-Max levels of N(0, 1);
               scores do not change, as q is turned too
    Stored     codes and an fp16 scale per token and head
    Needs      nothing
    Expect     between per-token integers and calibrated keys per channel
    Limits     head dims for which a Hadamard matrix is known
    Paper      Ashkboos et al. 2024, "QuaRot" (arXiv 2404.00456), for the rotation; Zandieh et al. 2025,
               "TurboQuant" (arXiv 2504.19874), for the levels; without its second stage
    """

    residual: int = option(0, "recent tokens in float beyond the page that is being filled: a multiple of 32")

    def scheme(self) -> Scheme:
        """Both sides alike, scales per head."""
        side = TensorScheme(self.bits, "token", "head", levels="normal", rotated=True)
        return Scheme(side, side, residual=self.residual)
