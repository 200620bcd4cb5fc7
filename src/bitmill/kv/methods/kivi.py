"""KIVI: keys per channel in groups of tokens, values per token in groups of channels, recent tokens in fp16."""

from __future__ import annotations

from dataclasses import dataclass

from bitmill.config.options import option
from bitmill.kv.scheme import KV_METHODS, PAGE, KVMethod, Scheme, TensorScheme, check_residual


@KV_METHODS.register("kivi")
@dataclass(frozen=True)
class KIVI(KVMethod):
    """KIVI: asymmetric min-max quantization without calibration.

    Problem    outlier channels of the keys make a scale per token useless
    Equation   k^ = s_c,g code + z_c,g for channel c and 32 tokens g; v^ = s_t,g code + z_t,g for token t and
               `group` channels g
    Stored     codes, fp16 scale and zero of every group: bits + 1 with groups of 32; the last tokens in fp16
    Needs      nothing
    Expect     2 bits for many heads, 4 for few (the authors' advice)
    Limits     keys stay in fp16 until 32 tokens fill a page
    Paper      Liu et al. 2024, "KIVI" (arXiv 2402.02750)
    """

    group: int = option(32, "channels of a value that share a scale; keys share one per channel over 32 tokens")
    residual: int = option(128, "recent tokens kept in fp16, the page being filled included: a multiple of 32")

    def scheme(self) -> Scheme:
        """Return keys per channel and page, values per token and group."""
        check_residual(self.residual)
        return Scheme(
            TensorScheme(self.bits, "page"),
            TensorScheme(self.bits, "token", self.group),
            residual=max(0, self.residual - PAGE),
        )
