"""Gradients of the model's loss by the weights of its linear layers, window by window and block by block.

One block is in memory at a time: a forward pass writes the inputs of every block to disk; then the blocks, from
last to first, run again and receive the gradient of their output. Memory does not grow with depth.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from bitmill.architectures.experts import expert_of
from bitmill.calibration.walk import HiddenStates, walk_blocks
from bitmill.errors import NumericsError, OutputError, RecipeError
from bitmill.files import make_folder, output_errors, write_tensors
from bitmill.models.block_call import BlockCall
from bitmill.models.streamed import StreamedModel
from bitmill.progress import Progress
from bitmill.tasks.base import Loss

# Adds the gradient (out, in) of a window, which it may overwrite, to those of earlier windows, None at first.
Reduce = Callable[[Tensor | None, Tensor], Tensor]
Change = Callable[[int], None]  # changes the weights of a block that was loaded
Observe = Callable[[int, list[Tensor]], None]  # receives the gradients by the outputs of a block, window by window


def walk_gradients(
    streamed: StreamedModel,
    windows: Tensor,
    folder: Path,
    progress: Progress,
    reduce: Reduce | None,
    change: Change | None = None,
    observe: Observe | None = None,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield the reduced gradients of the linears of every block, by path in the block, from the last to the first.

    Args:
        streamed: the float model.
        windows: token ids (windows, length).
        folder: for the inputs of the blocks, which are removed.
        progress: advanced by two for each block.
        reduce: combines the gradients of windows; None leaves out those of weights.
        change: changes the weights of each block before it runs, forwards and backwards.
        observe: receives the gradients by the outputs of each block, (1, tokens, width) a window.

    Raises:
        RecipeError: the model has an encoder and a decoder.
        NumericsError: the model's loss is NaN or Inf.
        OutputError: the folder has too little space.
    """
    if len(streamed.stacks.starts) > 1:
        raise RecipeError(
            f"{streamed.source.name} has an encoder and a decoder, through which no gradients of the loss are "
            "propagated; choose a method that needs none, such as gptq."
        )
    with output_errors(folder):
        make_folder(folder)
    with streamed.non_block_weights("embedding"):
        states = HiddenStates(streamed, windows.split(1))
    _check_space(streamed, folder, sum(hidden.nbytes for hidden in states.batches))
    for index, block in walk_blocks(streamed, progress):
        if change:
            change(index)
        write_tensors(
            _inputs(folder, index),
            {str(n): hidden for n, hidden in enumerate(states.batches)},
            shared=True,
            sync=False,  # removed once it has been read
        )
        states.advance(block, index)
    with streamed.non_block_weights("head"):
        loss, gradients = streamed.task.loss(), states.batches
        for n, window in enumerate(windows):
            gradients[n] = _loss_gradient(streamed, window[None], gradients[n], loss)
    for index, block in walk_blocks(streamed, progress, reverse=True):
        if change:
            change(index)
        if observe:
            observe(index, gradients)
        names = streamed.linears(index) if reduce else ()
        linears = {name: block.get_submodule(name) for name in names}
        path = _inputs(folder, index)
        yield index, _backward(block, linears, path, gradients, states.calls(index), reduce)
        path.unlink(missing_ok=True)


def _inputs(folder: Path, index: int) -> Path:
    return folder / f"inputs-{index:05d}.safetensors"


def _check_space(streamed: StreamedModel, folder: Path, hidden_bytes: int) -> None:
    """Raise OutputError if the folder cannot hold the inputs of all blocks and a number for every weight."""
    names = [
        f"{streamed.block_name(index)}.{linear}.weight"
        for index in range(len(streamed.blocks))
        for linear in streamed.linears(index)
    ]
    needed = len(streamed.blocks) * hidden_bytes + sum(4 * math.prod(streamed.shape(name)) for name in names)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"Gradients need {needed / 1e6:.0f} MB and {folder} has {free / 1e6:.0f} MB free; "
            "free some space, or calibrate on fewer windows."
        )


def _backward(
    block: nn.Module,
    linears: dict[str, nn.Module],
    inputs: Path,
    gradients: list[Tensor],
    calls: list[BlockCall],
    reduce: Reduce | None,
) -> dict[str, Tensor]:
    """Return the reduced gradients of one block's linears.

    Args:
        block: the block.
        linears: its linears, by path.
        inputs: file of the block's inputs, window by window.
        gradients: gradients of the loss by the block's output (1, tokens, width), window by window; replaced by
            those by its input.
        calls: arguments with which the model calls the block, window by window.
        reduce: combines the gradients of windows.
    """
    weights = {name: _WeightGradient(reduce) for name in linears} if reduce else {}
    hooks = [linear.register_forward_hook(weights[name].hook) for name, linear in linears.items()]
    try:
        with safe_open(inputs, "pt") as file, torch.enable_grad():
            for n, call in enumerate(calls):
                start = file.get_tensor(str(n)).to(gradients[n].device).requires_grad_()
                call.run(block, start).backward(gradients[n])
                assert start.grad is not None
                gradients[n] = start.grad
    finally:
        for hook in hooks:
            hook.remove()
    found = {name: weight.reduced.cpu() for name, weight in weights.items() if weight.reduced is not None}
    idle = {name for name in linears if name not in found and expert_of(name)}  # no token was sent to them
    return found | {name: torch.zeros_like(linears[name].get_parameter("weight"), device="cpu") for name in idle}


class _WeightGradient:
    """Reduces the gradients G^T X of a weight, once for each window, when the gradients G of the outputs arrive.

    Weights do not require gradients of their own, so none is kept for longer than its reduction takes; and the
    result is (out, in), also where the module stores its weight as (in, out). A layer that runs once for each
    token has the sum over its calls.
    """

    def __init__(self, reduce: Reduce) -> None:
        self.reduced: Tensor | None = None
        self._reduce = reduce
        self._expected = 0
        self._sum: Tensor | None = None

    def hook(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Wait for the gradient of an output; a forward hook."""
        X = args[0].detach().flatten(0, -2)
        if not output.requires_grad and not bool(X.any()):
            return  # the zeros that a recurrent layer starts from, which add nothing

        def arrived(G: Tensor) -> None:
            gradient = G.flatten(0, -2).T @ X
            self._sum = gradient if self._sum is None else self._sum.add_(gradient)
            self._expected -= 1
            if not self._expected:
                self.reduced, self._sum = self._reduce(self.reduced, self._sum), None

        output.register_hook(arrived)
        self._expected += 1


@torch.enable_grad()
def _loss_gradient(streamed: StreamedModel, tokens: Tensor, hidden: Tensor, loss_of: Loss) -> Tensor:
    """Return the gradient of a window's loss by the hidden states after the last block, (1, tokens, width)."""
    hidden = hidden.detach().clone().requires_grad_()
    loss = loss_of(tokens, streamed.head(tokens, hidden))
    if not bool(torch.isfinite(loss)):
        raise NumericsError("The model's loss on the calibration text is NaN or Inf; check the source's weights.")
    loss.backward()
    assert hidden.grad is not None
    return hidden.grad
