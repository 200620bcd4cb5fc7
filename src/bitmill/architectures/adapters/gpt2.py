"""GPT-2: q, k and v in one Conv1D, whose weight is stored (in, out).

The rows of v are part of one matrix with q and k, and GELU does not commute with a scale, so only the norms are
seams.
"""

from bitmill.architectures.adapter import Adapter, Seam, register

GPT2 = register(
    Adapter(
        name="gpt2",
        model_types=("gpt2",),
        blocks="transformer.h",
        stages=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
        fused=(),
        seams=(Seam("norm", "ln_1", ("attn.c_attn",)), Seam("norm", "ln_2", ("mlp.c_fc",))),
        embeddings=("transformer.wte", "transformer.wpe"),
        transposed=True,
    )
)
