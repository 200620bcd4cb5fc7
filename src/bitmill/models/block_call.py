"""How a model calls its blocks, learned by standing in for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


@dataclass(frozen=True)
class BlockCall:
    """How the model calls a block: everything but the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Forward one batch of hidden states (windows, tokens, width) through `block`."""
        return block_output(block(hidden, *self.args, **self.kwargs))

    def run_with(self, tensors: dict[str, Tensor], block: nn.Module, hidden: Tensor) -> Tensor:
        """The same with some of the block's parameters, by name, replaced by tensors that may carry gradients."""
        return block_output(functional_call(block, tensors, (hidden, *self.args), self.kwargs))

    def cut(self, windows: int, start: int, stop: int) -> BlockCall:
        """The same call for the windows `start` to `stop` of a batch of `windows`."""

        def of(value: object) -> object:
            if isinstance(value, Tensor):
                return value[start:stop] if value.dim() > 1 and value.shape[0] == windows > 1 else value
            if isinstance(value, tuple):
                return tuple(of(v) for v in value)
            return value

        return BlockCall(tuple(of(a) for a in self.args), {k: of(v) for k, v in self.kwargs.items()})


def block_output(output: Any) -> Tensor:
    """The hidden states in what a block returns: a tensor, or a tuple that starts with it."""
    return output[0] if isinstance(output, tuple) else output


def output_tensor(output: Any) -> Tensor:
    """What a model says of its tokens (windows, tokens, n): logits, or the hidden states of an encoder."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    return output.last_hidden_state if logits is None else logits


def output_fn(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The model as a function from tokens (windows, length), wherever they are, to its answer."""
    device = next(model.parameters()).device
    return lambda tokens: output_tensor(model(tokens.to(device)))


class StopForward(Exception):
    """Leaves the model's forward once every block has been recorded."""


class BlockRecorder(nn.Module):
    """Stands in for a block: records how it was called, and answers with `reply` or its input."""

    def __init__(self, block: nn.Module, as_tuple: bool) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)  # not a submodule: its parameters are not ours
        self.as_tuple = as_tuple
        self.stop = False
        self.replacement: Tensor | None = None
        self.hidden_in: Tensor | None = None
        self.output: Tensor | None = None
        self.call: BlockCall | None = None

    def __getattr__(self, name: str) -> Any:
        """Models read attributes of their blocks (attention_type); hand out the real block's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Record the call; then stop, reply, or pass the input on."""
        if args:
            hidden, rest = args[0], args[1:]
        else:
            hidden, rest = kwargs.pop("hidden_states"), ()
        self.hidden_in, self.call = hidden, BlockCall(rest, kwargs)
        if self.stop:
            raise StopForward
        output = hidden if self.replacement is None else self.replacement
        return (output,) if self.as_tuple else output
