"""BERT and the sentence encoders made from it (MiniLM, BGE, E5, GTE): norms after the residual sums.

Such a norm feeds both the linear layers after it and the residual stream, so no norm is a seam. Attention is
linear in the values; ReLU is the only activation of the MLP that commutes with a positive scale.
"""

from bitmill.architectures.adapter import Adapter, Seam, register

_QKV = ("attention.self.query", "attention.self.key", "attention.self.value")

BERT = register(
    Adapter(
        name="bert",
        model_types=("bert",),
        blocks="encoder.layer",
        stages=(_QKV, ("attention.output.dense",), ("intermediate.dense",), ("output.dense",)),
        fused=(_QKV,),
        seams=(
            Seam("linear", "attention.self.value", ("attention.output.dense",)),
            Seam("linear", "intermediate.dense", ("output.dense",), when=(("hidden_act", "relu"),)),
        ),
        embeddings=(
            "embeddings.word_embeddings",
            "embeddings.position_embeddings",
            "embeddings.token_type_embeddings",
        ),
        head="",
        task="text_encoder",
    )
)
