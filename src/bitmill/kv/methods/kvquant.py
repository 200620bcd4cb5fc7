"""KVQuant: keys per channel before RoPE, learned levels, exact outliers, sinks in float."""

from __future__ import annotations

from dataclasses import dataclass

from bitmill.fields import option
from bitmill.kv.base import KV_METHODS, KVMethod, Scheme, Side


@KV_METHODS.register("kvquant")
@dataclass(frozen=True)
class KVQuant(KVMethod):
    """KVQuant: non-uniform levels for keys per channel before RoPE and for values per token.

    Problem    keys have channels that are always large, and RoPE mixes them in pairs; a scale per token is wasted
    Equation   k^ = s_c L[code] + z_c per channel c, k' = RoPE(k^); v^ = s_t L[code] + z_t per token t
    Symbols    L: 2^bits learned levels, one table for the keys and one for the values of a layer
    Search     s_c, z_c from the 0.5 and 99.5 % quantiles over calibration tokens; L by weighted k-means on the
               normalized inliers, weight = squared gradient of the loss times s^2
    Stored     codes; fp16 s_t, z_t per token of values; outliers as fp16 and channel index; first tokens in fp16
    Needs      calibration text, and one backward pass over it (fisher)
    Cost       forward and backward over the calibration tokens, then k-means per layer
    Expect     see the ablation in docs/evidence.md
    Limits     rotary embeddings of the half-split kind; others with pre_rope=false. Outliers are the numbers with
               the largest error, not the largest magnitude, so that none is spent on what is stored well anyway
    Paper      Hooper et al. 2024, "KVQuant" (arXiv 2401.18079)
    """

    outliers: float = option(0.01, "share of a token's numbers kept exactly, of keys and of values")
    sink: int = option(1, "first tokens kept in float")
    pre_rope: bool = option(True, "store keys before RoPE")
    per_channel: bool = option(True, "scales of keys per channel; false: per token, as for values")
    nuq: bool = option(True, "learned levels; false: uniform ones")
    fisher: bool = option(True, "weigh numbers by the squared gradient of the loss when levels are learned")
    q_norm: bool = option(False, "shift and stretch the levels to keep mean and deviation; meant for 2 bits")

    def scheme(self) -> Scheme:
        """Static keys, values per token."""
        levels = "learned" if self.nuq else "uniform"
        norm = self.q_norm and self.nuq
        axis = "static" if self.per_channel else "token"
        keys = Side(self.bits, axis, levels=levels, outliers=self.outliers, q_norm=norm)  # type: ignore[arg-type]
        values = Side(self.bits, "token", levels=levels, outliers=self.outliers, q_norm=norm)  # type: ignore[arg-type]
        return Scheme(keys, values, pre_rope=self.pre_rope, sink=self.sink)
