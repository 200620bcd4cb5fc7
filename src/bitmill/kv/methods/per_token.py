"""Per-token integers, the plain baseline."""

from __future__ import annotations

from dataclasses import dataclass

from bitmill.config.options import option
from bitmill.kv.scheme import KV_METHODS, KVMethod, Scheme, TensorScheme


@KV_METHODS.register("per_token")
@dataclass(frozen=True)
class PerToken(KVMethod):
    """Round to nearest on a grid from the least to the largest number of each token.

    Problem    the cheapest quantization of a cache, and the floor every method must beat
    Equation   x^ = s_t code + z_t, for keys after RoPE and for values
    Stored     codes, fp16 scale and zero of every token, or of every `group` channels of it
    Needs      nothing
    Expect     near float at 8 bits, breaks at 4 and below, where keys have a few large channels
    Paper      the baseline of Hooper et al. 2024 (arXiv 2401.18079), table 1
    """

    bits: int = option(8, "bits of a code: 2, 3, 4 or 8")
    group: int | None = option(None, "channels that share a scale; all of a token's without it")

    def scheme(self) -> Scheme:
        """Both sides alike."""
        side = TensorScheme(self.bits, "token", self.group)
        return Scheme(side, side)
