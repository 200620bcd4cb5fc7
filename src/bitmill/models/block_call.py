"""The arguments with which a model calls its blocks, recorded by modules that replace the blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


@dataclass(frozen=True)
class BlockCall:
    """The arguments of a block's forward, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Return the output of a block.

        Args:
            block: the block.
            hidden: (windows, tokens, width) hidden states.
        """
        return block_output(block(hidden, *self.args, **self.kwargs))

    def run_with(self, tensors: dict[str, Tensor], block: nn.Module, hidden: Tensor) -> Tensor:
        """Run a block with some of its parameters replaced by tensors that may carry gradients.

        Args:
            tensors: name of the parameter inside the block -> tensor.
            block: the block.
            hidden: (windows, tokens, width) hidden states.
        """
        return block_output(functional_call(block, tensors, (hidden, *self.args), self.kwargs))

    def cut(self, windows: int, start: int, stop: int) -> BlockCall:
        """Return the call for some windows of a batch.

        Args:
            windows: windows of the batch; tensors with that many rows are cut.
            start: first window.
            stop: window after the last one.
        """

        def cut_value(value: object) -> object:
            if isinstance(value, Tensor):
                return value[start:stop] if value.dim() > 1 and value.shape[0] == windows > 1 else value
            if isinstance(value, tuple):
                return tuple(cut_value(v) for v in value)
            return value

        return BlockCall(tuple(cut_value(a) for a in self.args), {k: cut_value(v) for k, v in self.kwargs.items()})


def block_output(output: Any) -> Tensor:
    """Return the hidden states of a block's output, which is a tensor or a tuple that starts with it."""
    return output[0] if isinstance(output, tuple) else output


def output_tensor(output: Any) -> Tensor:
    """Return the logits (windows, tokens, vocabulary) of a model output, or the hidden states of an encoder."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    return output.last_hidden_state if logits is None else logits


def output_fn(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a function from tokens (windows, length) on any device to logits, or hidden states of an encoder."""
    device = next(model.parameters()).device
    return lambda tokens: output_tensor(model(tokens.to(device)))


class StopForward(Exception):
    """Ends a model's forward once every block has been recorded."""


class BlockRecorder(nn.Module):
    """A module in place of a block, which records the call and returns `replacement` or its input.

    as_tuple: return a tuple, as the blocks of some models do.
    stop: raise StopForward instead of returning.
    replacement: hidden states to return in place of the input.
    hidden_in: hidden states that the block received.
    output: output of the whole model, set by the caller.
    call: the other arguments that the block received.
    """

    def __init__(self, block: nn.Module, as_tuple: bool) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)  # no submodule, so that parameters stay with the block
        self.as_tuple = as_tuple
        self.stop = False
        self.replacement: Tensor | None = None
        self.hidden_in: Tensor | None = None
        self.output: Tensor | None = None
        self.call: BlockCall | None = None

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the block, because models read some of them (attention_type)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Record the call; then stop, or return the replacement or the input."""
        if args:
            hidden, rest = args[0], args[1:]
        else:
            hidden, rest = kwargs.pop("hidden_states"), ()
        self.hidden_in, self.call = hidden, BlockCall(rest, kwargs)
        if self.stop:
            raise StopForward
        output = hidden if self.replacement is None else self.replacement
        return (output,) if self.as_tuple else output
