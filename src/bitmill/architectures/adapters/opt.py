"""OPT: LayerNorm, learned positions, plain MLP.

ReLU commutes with a positive scale, so fc1 to fc2 is a seam. The 350m model normalizes after the residual sum, so
its norms feed the residual stream too and are no seams.
"""

from bitmill.architectures.adapter import Adapter, Seam, register

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_PRE_NORM = (("do_layer_norm_before", True),)

OPT = register(
    Adapter(
        name="opt",
        model_types=("opt",),
        blocks="model.decoder.layers",
        stages=(_QKV, ("self_attn.out_proj",), ("fc1",), ("fc2",)),
        fused=(_QKV,),
        seams=(
            Seam("norm", "self_attn_layer_norm", _QKV, when=_PRE_NORM),
            Seam("linear", "self_attn.v_proj", ("self_attn.out_proj",)),
            Seam("norm", "final_layer_norm", ("fc1",), when=_PRE_NORM),
            Seam("linear", "fc1", ("fc2",), when=(("activation_function", "relu"),)),
        ),
        embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    )
)
