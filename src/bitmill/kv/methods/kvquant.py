"""KVQuant: keys per channel before RoPE, learned levels, exact outliers, attention sinks in fp16."""

from __future__ import annotations

from dataclasses import dataclass

from bitmill.config.options import option
from bitmill.kv.scheme import KV_METHODS, KVMethod, Scheme, TensorScheme


@KV_METHODS.register("kvquant")
@dataclass(frozen=True)
class KVQuant(KVMethod):
    """KVQuant: non-uniform levels for keys per channel before RoPE and for values per token.

    Problem    keys have outlier channels, which RoPE mixes in pairs; a scale per token fits none of them
    Equation   k^ = L_c[code] per channel c, k' = RoPE(k^); v^ = d_c (s_t L[code] + z_t) + m_c per token t
    Symbols    L_c, L: 2^bits learned levels; m_c, d_c mean and deviation of a channel, s_t, z_t range of a token
    Search     levels by weighted k-means on calibration tokens, weight = squared gradient of the loss (times the
               squared scale); outliers: the numbers of a token with the largest error, weighted likewise
    Stored     codes; fp16 s_t, z_t per token of values; outliers as fp16 and channel index; sinks in fp16
    Departs    levels for each channel of the keys, equalized channels of the values, outliers by weighted error,
               more of keys than of values, and recent tokens in fp16 are bitmill's. The paper has one table per
               layer, key channels scaled by their quantiles, outliers by magnitude; all but the last are set by
               channel_levels=false, equalize=false, outliers=0.01, key_outliers=0.01, residual=0
    Needs      calibration text, and one backward pass over it (fisher)
    Cost       forward and backward over the calibration tokens, then k-means per layer
    Expect     perplexity rises by little at 4 bits, by about 1 % at 3, by less than 10 % at 2; the ablation of
               each part is in docs/kv-measured.md
    Limits     rotary embeddings of the half-split kind; others with pre_rope=false
    Paper      Hooper et al. 2024, "KVQuant" (arXiv 2401.18079)
    """

    outliers: float = option(0.005, "fraction of a token's values stored exactly")
    key_outliers: float = option(0.02, "fraction of a token's keys stored exactly")
    sink: int = option(1, "first tokens (attention sinks) kept in fp16")
    residual: int = option(64, "recent tokens kept in fp16 in addition to the page being filled: a multiple of 32")
    pre_rope: bool = option(True, "store keys before RoPE")
    per_channel: bool = option(True, "scales of keys per channel; false: per token, as for values")
    nuq: bool = option(True, "learned levels; false: uniform ones")
    channel_levels: bool = option(
        True, "levels per channel of the keys; false: one table, and a scale per channel"
    )
    equalize: bool = option(True, "normalize channels of values to mean 0 and deviation 1 first")
    fisher: bool = option(True, "weight errors by the squared gradient of the loss, for levels and for outliers")
    q_norm: bool = option(False, "shift and scale the levels to preserve mean and deviation; for 2 bits")

    def scheme(self) -> Scheme:
        """Return keys with levels or scales per channel, values with scales per token."""
        levels = "learned" if self.nuq else "uniform"
        norm = self.q_norm and self.nuq
        axis = "channel" if self.channel_levels and self.nuq else "static"
        axis = axis if self.per_channel else "token"
        share, even = self.outliers, self.equalize
        keys = TensorScheme(self.bits, axis, None, levels, self.key_outliers, q_norm=norm)  # type: ignore[arg-type]
        values = TensorScheme(self.bits, "token", None, levels, share, q_norm=norm, equalized=even)  # type: ignore[arg-type]
        return Scheme(keys, values, pre_rope=self.pre_rope, sink=self.sink, residual=self.residual)
