"""Integers with a scale per token, the baseline."""

from __future__ import annotations

from dataclasses import dataclass

from bitmill.config.options import option
from bitmill.kv.scheme import KV_METHODS, KVMethod, Scheme, TensorScheme


@KV_METHODS.register("per_token")
@dataclass(frozen=True)
class PerToken(KVMethod):
    """Round to nearest on a uniform grid over the range of each token.

    Problem    the cheapest quantization of a cache, which every method must beat
    Equation   x^ = s_t code + z_t, for keys after RoPE and for values
    Stored     codes, fp16 scale and zero of every token, or of every `group` channels of it
    Needs      nothing
    Expect     near float at 8 bits; fails at 4 and below, as keys have a few outlier channels
    Paper      the baseline of Hooper et al. 2024 (arXiv 2401.18079), table 1
    """

    bits: int = option(8, "bits of a code: 2, 3, 4 or 8")
    group: int | None = option(None, "channels that share a scale; without it one scale per token")

    def scheme(self) -> Scheme:
        """Return one scheme for keys and values."""
        both = TensorScheme(self.bits, "token", self.group)
        return Scheme(both, both)
