"""Configs of recurrent language models: the `config.json` of their folders."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig


@strict
class RecurrentConfig(PreTrainedConfig):
    """Sizes of a recurrent language model.

    Args:
        vocab_size: tokens of the vocabulary.
        embedding_size: width of the token embeddings.
        hidden_size: width of the state of a layer.
        num_hidden_layers: recurrent layers.
        projection_size: width to which the output of every layer is projected; 0 for none.
        concat_layers: the output layer reads the embedding and the outputs of all layers, joined.
        attention_average: the output layer reads a weighted average of the tokens so far, with learned weights.
        head_bias: the output layer has a bias.
        dropout: share of zeroed channels before the first layer, and after every layer, in training.
        tie_word_embeddings: the output layer uses the matrix of the embeddings.
    """

    vocab_size: int = 1000
    embedding_size: int = 128
    hidden_size: int = 128
    num_hidden_layers: int = 1
    projection_size: int = 0
    concat_layers: bool = False
    attention_average: bool = False
    head_bias: bool = False
    dropout: float = 0.0
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Check that the parts fit together. Raises ValueError."""
        super().__post_init__(**kwargs)
        named = ("vocab_size", "embedding_size", "hidden_size", "num_hidden_layers")
        for name in named:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} and must be at least 1")
        if not 0 <= self.projection_size < self.hidden_size:
            raise ValueError(f"projection_size is {self.projection_size} and must be below {self.hidden_size}")
        if self.tie_word_embeddings and self.head_size != self.embedding_size:
            raise ValueError(
                f"the output layer reads {self.head_size} channels, and embeddings have {self.embedding_size}, so "
                "they cannot be tied"
            )

    @property
    def output_size(self) -> int:
        """Width of the output of a layer."""
        return self.projection_size or self.hidden_size

    @property
    def head_size(self) -> int:
        """Width that the output layer reads."""
        joined = self.embedding_size + self.num_hidden_layers * self.output_size
        return joined if self.concat_layers else self.output_size

    def input_size(self, index: int) -> int:
        """Return the width that layer `index` reads."""
        return self.output_size if index else self.embedding_size


@strict
class LstmConfig(RecurrentConfig):
    """Sizes of an LSTM language model, see `RecurrentConfig`."""

    model_type = "lstm_lm"


@strict
class GruConfig(RecurrentConfig):
    """Sizes of a GRU language model, see `RecurrentConfig`."""

    model_type = "gru_lm"

    def __post_init__(self, **kwargs: Any) -> None:
        """Check that there is no projection. Raises ValueError."""
        super().__post_init__(**kwargs)
        if self.projection_size:
            raise ValueError(f"projection_size is {self.projection_size}, and a GRU has no projection")
