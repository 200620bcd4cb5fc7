"""Recurrent layers with one linear layer for each gate, so that every gate can be quantized by itself.

    LSTM    i, f, o = sigmoid(W x + b + U h)    g = tanh(W x + b + U h)    c' = f c + i g    h' = P (o tanh(c'))
    GRU     r, z = sigmoid(W x + b + U h)       n = tanh(W x + b + r (U h + d))              h' = (1 - z) n + z h

Gates have the names of torch.nn.LSTM and torch.nn.GRU. P is the projection, where there is one.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from bitmill.recurrent.config import RecurrentConfig

State = tuple[Tensor, ...]  # of a layer after a token: output (batch, out), and what else the next token needs


class RecurrentLayer(nn.Module):
    """A recurrent layer over (batch, tokens, channels).

    Attributes:
        input_hidden: gate -> linear layer of the inputs; it runs once for all tokens.
        hidden_hidden: gate -> linear layer of the last output; it runs once for each token.
        projection: linear layer of the outputs, or None.
    """

    gates: ClassVar[tuple[str, ...]]
    hidden_biases: ClassVar[tuple[str, ...]] = ()  # gates whose bias on the last output cannot join the other one

    def __init__(self, config: RecurrentConfig, index: int) -> None:
        super().__init__()
        self.input_size, self.hidden_size = config.input_size(index), config.hidden_size
        self.output_size, self.concat = config.output_size, config.concat_layers
        self.input_hidden = nn.ModuleDict({g: nn.Linear(self.input_size, self.hidden_size) for g in self.gates})
        self.hidden_hidden = nn.ModuleDict(
            {g: nn.Linear(self.output_size, self.hidden_size, bias=g in self.hidden_biases) for g in self.gates}
        )
        projected = config.projection_size
        self.projection = nn.Linear(self.hidden_size, projected, bias=False) if projected else None
        self.dropout = nn.Dropout(config.dropout)

    def start(self, hidden: Tensor) -> State:
        """Return the state before the first token, zeros."""
        raise NotImplementedError

    def step(self, inputs: list[Tensor], state: State) -> State:
        """Return the state after a token.

        Args:
            inputs: W x + b (batch, hidden) of every gate.
            state: before the token.
        """
        raise NotImplementedError

    def forward(self, hidden: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run over tokens.

        Args:
            hidden: (batch, tokens, channels); the last channels are the inputs of this layer.
            state: after the token before these; None for the start of a text.

        Returns:
            Outputs (batch, tokens, channels), joined to `hidden` where the config says so, and the state after
            the last token.
        """
        x = hidden[..., -self.input_size :]
        projected = [linear(x) for linear in self.input_hidden.values()]
        state = self.start(hidden) if state is None else state
        outputs = []
        for token in zip(*(inputs.unbind(1) for inputs in projected)):
            state = self.step(list(token), state)
            outputs.append(state[0])
        output = self.dropout(torch.stack(outputs, 1))
        return torch.cat([hidden, output], -1) if self.concat else output, state

    def _zeros(self, hidden: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        return hidden.new_zeros(hidden.shape[0], width, dtype=dtype)

    def _project(self, output: Tensor) -> Tensor:
        return output if self.projection is None else self.projection(output)


class LstmLayer(RecurrentLayer):
    """A layer of torch.nn.LSTM; its cell state is float32."""

    gates = ("i", "f", "g", "o")

    def start(self, hidden: Tensor) -> State:
        """Return the state before the first token, zeros."""
        last = self._zeros(hidden, self.output_size, hidden.dtype)
        return last, self._zeros(hidden, self.hidden_size, torch.float32)

    def step(self, inputs: list[Tensor], state: State) -> State:
        """Return the output and the cell state after a token; see `RecurrentLayer.step`."""
        last, cell = state
        i, f, g, o = (x + linear(last) for x, linear in zip(inputs, self.hidden_hidden.values()))
        cell = f.sigmoid().float() * cell + (i.sigmoid() * g.tanh()).float()
        return self._project(o.sigmoid() * cell.tanh().to(o.dtype)), cell


class GruLayer(RecurrentLayer):
    """A layer of torch.nn.GRU."""

    gates = ("r", "z", "n")
    hidden_biases = ("n",)

    def start(self, hidden: Tensor) -> State:
        """Return the state before the first token, zeros."""
        return (self._zeros(hidden, self.output_size, hidden.dtype),)

    def step(self, inputs: list[Tensor], state: State) -> State:
        """Return the output after a token; see `RecurrentLayer.step`."""
        (last,) = state
        reset, update, new = (linear(last) for linear in self.hidden_hidden.values())
        update = (inputs[1] + update).sigmoid()
        new = (inputs[2] + (inputs[0] + reset).sigmoid() * new).tanh()
        return ((1 - update) * new + update * last,)
