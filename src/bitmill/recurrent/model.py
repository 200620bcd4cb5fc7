"""Recurrent language models of transformers: embeddings, recurrent layers, an output layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from bitmill.recurrent.average import AttentionAverage
from bitmill.recurrent.config import GruConfig, LstmConfig, RecurrentConfig
from bitmill.recurrent.layer import GruLayer, LstmLayer, RecurrentLayer, State

# of the output; later releases of transformers have the first name
_CACHE = next(name for name in ("cache", "past_key_values") if hasattr(CausalLMOutputWithPast, name))


@dataclass(frozen=True)
class RecurrentState:
    """The state of a model after some tokens; models read it and make a new one.

    layers: of every layer.
    average: of the weighted average, or None.
    """

    layers: tuple[State, ...]
    average: State | None = None

    def select(self, rows: Tensor) -> RecurrentState:
        """Return the state of some rows of the batch, by index (n,)."""

        def selected(state: State) -> State:
            return tuple(tensor.index_select(0, rows) for tensor in state)

        average = None if self.average is None else selected(self.average)
        return RecurrentState(tuple(selected(state) for state in self.layers), average)


class RecurrentModel(nn.Module):
    """Embeddings and recurrent layers, without the output layer.

    Args:
        config: sizes.
        layer_class: of the layers.
    """

    def __init__(self, config: RecurrentConfig, layer_class: type[RecurrentLayer]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(layer_class(config, index) for index in range(config.num_hidden_layers))
        self.average = AttentionAverage(config.head_size) if config.attention_average else None

    def forward(self, input_ids: Tensor, state: RecurrentState | None = None) -> tuple[Tensor, RecurrentState]:
        """Return the hidden states (batch, tokens, width) that the output layer reads, and the state afterwards.

        Args:
            input_ids: (batch, tokens).
            state: after earlier tokens; None for the start of a text.
        """
        hidden = self.dropout(self.embed_tokens(input_ids))
        states = []
        for layer, before in zip(self.layers, (None,) * len(self.layers) if state is None else state.layers):
            output = layer(hidden, before)
            # a module in place of a layer may return hidden states alone
            hidden, after = output if isinstance(output, tuple) else (output, None)
            states.append(after)
        average = None
        if self.average is not None:
            hidden, average = self.average(hidden, None if state is None else state.average)
        return hidden, RecurrentState(tuple(states), average)


class RecurrentForCausalLM(PreTrainedModel, GenerationMixin):
    """A recurrent language model; its cache (`past_key_values`) is a RecurrentState."""

    config_class = RecurrentConfig
    base_model_prefix = "model"
    _is_stateful = True
    _no_split_modules = ["LstmLayer", "GruLayer"]  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    layer_class: ClassVar[type[RecurrentLayer]]
    config: RecurrentConfig

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__(config)
        self.model = RecurrentModel(config, self.layer_class)
        self.lm_head = nn.Linear(config.head_size, config.vocab_size, bias=config.head_bias)
        self.post_init()

    def get_decoder(self) -> nn.Module:
        """Return the model without its output layer."""
        return self.model

    def forward(
        self,
        input_ids: Tensor,
        past_key_values: RecurrentState | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits (batch, tokens, vocabulary), and the state after the last token.

        Args:
            input_ids: (batch, tokens); rows that are padded must be padded at their end.
            past_key_values: state after earlier tokens; None for the start of a text.
            use_cache: return the state.
            logits_to_keep: return the logits of the last tokens alone; 0 for all.
            labels: token ids like `input_ids`; the output then has the mean loss of the next token.
            kwargs: of other models, such as masks, which a recurrent model does not need.
        """
        hidden, state = self.model(input_ids, past_key_values)
        logits = self.lm_head(hidden[:, -logits_to_keep:])
        keep = self.config.use_cache if use_cache is None else use_cache
        kept: dict[str, Any] = {_CACHE: state} if keep else {}
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, **kept)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: RecurrentState | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the arguments of the next call of `generate`: after the first one, the last token alone."""
        ids = input_ids if past_key_values is None else input_ids[:, -1:]
        return {"input_ids": ids, "past_key_values": past_key_values, "use_cache": kwargs.get("use_cache", True)}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw weights from U(-k, k) with k = 1 / sqrt(columns), as torch.nn.LSTM does; biases are zero."""
        if isinstance(module, (nn.Linear, nn.Embedding)) and module.weight.numel():  # packed ones have none
            k = module.weight.shape[1] ** -0.5
            nn.init.uniform_(module.weight, -k, k)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


class LstmForCausalLM(RecurrentForCausalLM):
    """An LSTM language model."""

    config_class = LstmConfig
    layer_class = LstmLayer


class GruForCausalLM(RecurrentForCausalLM):
    """A GRU language model."""

    config_class = GruConfig
    layer_class = GruLayer
