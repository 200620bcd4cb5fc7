"""Hadamard rotation, and optimal levels for a normal distribution."""

from __future__ import annotations

from dataclasses import dataclass

from bitmill.config.options import option
from bitmill.kv.scheme import KV_METHODS, KVMethod, Scheme, TensorScheme


@KV_METHODS.register("rotated")
@dataclass(frozen=True)
class Rotated(KVMethod):
    """Rotate every head by a Hadamard matrix: its numbers become nearly normal, which Lloyd-Max levels suit.

    Problem    a few outlier channels inflate the scale of a token
    Equation   x^ = H^T (s L[code]), s the root mean square of the head's numbers, L Lloyd-Max levels of N(0, 1);
               scores do not change, as q is rotated too
    Stored     codes and an fp16 scale per token and head
    Needs      nothing
    Expect     between per-token integers and calibrated keys per channel
    Limits     head dimensions for which a Hadamard matrix is available
    Paper      Ashkboos et al. 2024, "QuaRot" (arXiv 2404.00456), for the rotation; Zandieh et al. 2025,
               "TurboQuant" (arXiv 2504.19874), for the levels; without its second stage
    """

    residual: int = option(0, "recent tokens kept in fp16 in addition to the page being filled: a multiple of 32")

    def scheme(self) -> Scheme:
        """Return one scheme for keys and values, with a scale per head."""
        both = TensorScheme(self.bits, "token", "head", levels="normal", rotated=True)
        return Scheme(both, both, residual=self.residual)
