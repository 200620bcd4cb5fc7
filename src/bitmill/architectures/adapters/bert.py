"""BERT and the sentence encoders made from it (MiniLM, BGE, E5, GTE): norms after the residual sums.

Such a norm feeds the linears behind it and the residual stream past them, so that none can be scaled for its
linears alone. Attention is linear in the values; of the MLP's activations only ReLU passes a positive scale on.
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
