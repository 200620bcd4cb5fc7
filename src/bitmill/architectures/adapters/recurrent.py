"""LSTM and GRU language models: one linear layer for each gate, of the inputs and of the last output.

The activations between two linear layers are bounded, so a scale cannot pass them: there are no seams. Gates are
not fused, so that each of them may have its own format.
"""

from bitmill.architectures.adapter import Adapter, register


def _adapter(name: str, gates: tuple[str, ...]) -> Adapter:
    inputs, hidden = (tuple(f"{side}.{gate}" for gate in gates) for side in ("input_hidden", "hidden_hidden"))
    return Adapter(
        name=name,
        model_types=(name,),
        blocks="model.layers",
        stages=(inputs, hidden, ("projection",)),
        fused=(),
        seams=(),
        embeddings=("model.embed_tokens",),
        optional=(("projection", "projection_size"),),
        recurrent=True,
    )


LSTM = register(_adapter("lstm_lm", ("i", "f", "g", "o")))
GRU = register(_adapter("gru_lm", ("r", "z", "n")))
