"""Llama 1 to 3.x, SmolLM, TinyLlama: pre-norm, rotary, gated MLP."""

from bitmill.architectures.adapter import Adapter, Seam, register

LLAMA = register(
    Adapter(
        name="llama",
        model_types=("llama",),
        blocks="model.layers",
        stages=(
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.o_proj",),
            ("mlp.gate_proj", "mlp.up_proj"),
            ("mlp.down_proj",),
        ),
        fused=(
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("mlp.gate_proj", "mlp.up_proj"),
        ),
        seams=(
            Seam("norm", "input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            Seam("linear", "self_attn.v_proj", ("self_attn.o_proj",)),
            Seam("norm", "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
            Seam("linear", "mlp.up_proj", ("mlp.down_proj",)),
        ),
        embeddings=("model.embed_tokens",),
    )
)
