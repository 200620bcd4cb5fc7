"""The arguments with which a model calls its blocks, recorded by modules that replace the blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

# Where a tensor is among the arguments of a call: positions and keys, from the outside in.
Path = tuple[Any, ...]
# Path of a tensor -> the dimension that counts windows, and how many of its rows belong to one window.
Rows = Mapping[Path, tuple[int, int]]


@dataclass(frozen=True)
class BlockCall:
    """The arguments of a block's forward, without the hidden states.

    rows: the tensors with rows of their own for every window; any other argument serves all windows.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: Rows = field(default_factory=dict)

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
            windows: windows of the batch.
            start: first window.
            stop: window after the last one; the batch may end before it.
        """
        stop = min(stop, windows)

        def cut_tensor(path: Path, tensor: Tensor) -> Tensor:
            dim, rows = self.rows.get(path, (0, 0))
            if not rows or tensor.shape[dim] != rows * windows:
                return tensor
            return tensor.narrow(dim, start * rows, (stop - start) * rows)

        args, kwargs = _map_tensors((self.args, self.kwargs), cut_tensor)
        return BlockCall(args, kwargs, self.rows)

    def signature(self) -> frozenset[tuple[Path, int]]:
        """Return the path and the number of dimensions of every tensor."""
        found: set[tuple[Path, int]] = set()
        _map_tensors((self.args, self.kwargs), lambda path, tensor: found.add((path, tensor.dim())))
        return frozenset(found)


def rows_of_windows(one: BlockCall, two: BlockCall) -> Rows:
    """Return which tensors of a call have rows for every window, and how many.

    A size alone does not say so: a bias for each head may have as many rows as there are windows, and one for each
    head of each window has more.

    Args:
        one: the call for one window.
        two: the call for two windows of the same length.
    """
    shapes: dict[Path, tuple[int, ...]] = {}
    rows: dict[Path, tuple[int, int]] = {}

    def note(path: Path, tensor: Tensor) -> None:
        shapes[path] = tuple(tensor.shape)

    def compare(path: Path, tensor: Tensor) -> None:
        single, double = shapes.get(path, ()), tuple(tensor.shape)
        different = [dim for dim, (a, b) in enumerate(zip(single, double)) if a != b]
        if len(single) == len(double) and len(different) == 1 and double[different[0]] == 2 * single[different[0]]:
            rows[path] = (different[0], single[different[0]])

    _map_tensors((one.args, one.kwargs), note)
    _map_tensors((two.args, two.kwargs), compare)
    return rows


def _map_tensors(value: Any, function: Callable[[Path, Tensor], Any], path: Path = ()) -> Any:
    """Return a value with every tensor, also inside tuples, lists and dicts, replaced by a function of it."""
    if isinstance(value, Tensor):
        return function(path, value)
    if type(value) in (tuple, list):
        return type(value)(_map_tensors(v, function, (*path, index)) for index, v in enumerate(value))
    if type(value) is dict:
        return {key: _map_tensors(v, function, (*path, key)) for key, v in value.items()}
    return value


def block_output(output: Any) -> Tensor:
    """Return the hidden states of a block's output, which is a tensor or a tuple that starts with it."""
    return output[0] if isinstance(output, tuple) else output


def output_tensor(output: Any) -> Tensor:
    """Return the logits (windows, tokens, vocabulary) of a model output, or the hidden states of an encoder."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    return output.last_hidden_state if logits is None else logits


def output_fn(
    model: nn.Module, call: Callable[[nn.Module, Tensor], Any] | None = None
) -> Callable[[Tensor], Tensor]:
    """Return a function from windows on any device to logits, or hidden states of an encoder.

    Args:
        model: the model.
        call: runs it on windows, see `Task.call`; they are its first argument without it.
    """
    device, run = next(model.parameters()).device, call or (lambda model, tokens: model(tokens))
    return lambda tokens: output_tensor(run(model, tokens.to(device)))


class StopForward(Exception):
    """Ends a model's forward once every block has been recorded."""


class BlockRecorder(nn.Module):
    """A module in place of a block, which records the call and returns `replacement` or its input.

    outputs: length of the tuple that it returns, as the blocks of some models do; 0 returns a tensor.
    stop: raise StopForward instead of returning.
    replacement: hidden states to return in place of the input.
    hidden_in: hidden states that the block received.
    output: output of the whole model, set by the caller.
    call: the other arguments that the block received.
    runs: the block runs too, for what it returns behind the hidden states.
    relayed: these outputs, of the first block of a stack; all blocks of the stack return them, as T5 hands its
        position bias on from block to block. None where there are none.
    """

    def __init__(self, block: nn.Module, outputs: int) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)  # no submodule, so that parameters stay with the block
        self.outputs = outputs
        self.stop = False
        self.replacement: Tensor | None = None
        self.hidden_in: Tensor | None = None
        self.output: Tensor | None = None
        self.call: BlockCall | None = None
        self.runs = False
        self.relayed: list[Any] | None = None

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
        if self.runs and self.relayed is not None:
            self.relayed += self.__dict__["_block"](hidden, *rest, **kwargs)[1:]
        if self.stop:
            raise StopForward
        output = hidden if self.replacement is None else self.replacement
        others = self.relayed or [None] * (self.outputs - 1)
        return (output, *others) if self.outputs else output


class Handed:
    """A value that a recorder returns behind the hidden states, to see if later blocks receive it."""


def receives(call: BlockCall, kind: type) -> bool:
    """Return True if an argument of a block is an object of a class."""
    return any(isinstance(value, kind) for value in (*call.args, *call.kwargs.values()))
