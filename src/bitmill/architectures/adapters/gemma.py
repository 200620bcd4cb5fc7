"""Gemma 1 to 3 (text): the linear layers of Llama, and norms that multiply by (1 + weight).

From Gemma 2 on there are norms after attention and MLP too, so the norm before the MLP has another name.
"""

from dataclasses import replace

from bitmill.architectures.adapter import Seam, register
from bitmill.architectures.adapters.llama import LLAMA


def _gemma_seam(seam: Seam, norm_before_mlp: str) -> Seam:
    """Return a seam of Llama with the norm of Gemma as its source."""
    if seam.kind != "norm":
        return seam
    source = norm_before_mlp if seam.source == "post_attention_layernorm" else seam.source
    return replace(seam, source=source, norm_plus_one=True)


GEMMA = register(
    replace(
        LLAMA,
        name="gemma",
        model_types=("gemma",),
        seams=tuple(_gemma_seam(seam, "post_attention_layernorm") for seam in LLAMA.seams),
    )
)

GEMMA2 = register(
    replace(
        LLAMA,
        name="gemma2",
        model_types=("gemma2",),
        seams=tuple(_gemma_seam(seam, "pre_feedforward_layernorm") for seam in LLAMA.seams),
    )
)

GEMMA3_TEXT = register(replace(GEMMA2, name="gemma3_text", model_types=("gemma3_text",)))
