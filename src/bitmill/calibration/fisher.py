"""The Fisher diagonal: how much the model's own loss minds a change of each single weight.

    F = mean over windows of (d loss / d W)^2        loss: mean next-token cross entropy of one window;
                                                     of an encoder u e, e its embedding, u drawn from N(0, I)

One backward pass a window, through a model of which one block is in memory at a time: a float forward pass
leaves the inputs of every block on the disk, then blocks are taken last to first, run again, and sent the
gradient of their output. Squares are summed in fp32 (a weight's square is of the order of 1e-10, which half
types round away); results go to the disk too, so memory does not grow with depth.

The gradient is averaged over a window's tokens before it is squared, as in SqueezeLLM (arXiv 2306.07629,
section 4.1 and its published gradient code), so this is no Fisher matrix of single tokens. An encoder has no
tokens to predict; the mean over u of (d u e / d W)^2 is |d e / d W|^2, how far a small change of W moves the
embedding, which is the Fisher diagonal of a model that answers e and noise.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bitmill.calibration.store import replace_file
from bitmill.errors import NumericsError, OutputError
from bitmill.models.block_call import BlockCall
from bitmill.models.streamed import StreamedModel
from bitmill.progress import Progress
from bitmill.tasks.base import Loss

WINDOWS = 100  # more windows than these are not read: the published figures use 100


class Fisher:
    """The Fisher diagonal of every linear of every block, kept in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def block(self, index: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Name of the linear inside its block -> F, fp32 (out, in)."""
        return load_file(self._file(index), str(device))

    @property
    def complete(self) -> bool:
        """Whether all blocks are there: the first block's file is written last."""
        return self._file(0).exists()

    def measure(self, streamed: StreamedModel, windows: Tensor, progress: Progress) -> None:
        """Fill the folder from windows of tokens (windows, length); at most WINDOWS of them are read.

        Raises NumericsError when the model's loss is NaN or Inf, OutputError when the folder has no room.
        """
        windows = windows[:WINDOWS]
        self.folder.mkdir(parents=True, exist_ok=True)
        count = len(streamed.blocks)
        progress.start("Fisher information", 2 * count)
        with streamed.non_block_weights("embedding"):
            entered = [streamed.embed(window[None]) for window in windows]
        hidden = torch.cat([start for start, _ in entered])
        calls = [call for _, call in entered]
        del entered
        self._check_space(streamed, hidden)
        for index in range(count):
            save_file({"hidden": hidden}, self._inputs(index))
            block = streamed.load_block(index)
            for n, call in enumerate(calls):
                hidden[n] = call[index].run(block, hidden[n : n + 1])[0]
            streamed.free_block(index)
            progress.advance()
        with streamed.non_block_weights("head"):
            loss = streamed.task.loss()
            for n, window in enumerate(windows):
                hidden[n] = _loss_gradient(streamed, window[None], hidden[n : n + 1], loss)[0]
        for index in reversed(range(count)):
            block = streamed.load_block(index)
            squares = self._backward(streamed, block, index, hidden, [call[index] for call in calls])
            replace_file(self._file(index), partial(save_file, squares))
            streamed.free_block(index)
            progress.advance()

    def _check_space(self, streamed: StreamedModel, hidden: Tensor) -> None:
        names = [
            f"{streamed.block_name(index)}.{linear}.weight"
            for index in range(len(streamed.blocks))
            for linear in streamed.adapter.linears
        ]
        needed = len(streamed.blocks) * hidden.nbytes + sum(4 * math.prod(streamed.shape(name)) for name in names)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OutputError(
                f"Squared gradients need {needed / 1e6:.0f} MB and {self.folder} has {free / 1e6:.0f} MB free; "
                "free some space, or calibrate on fewer windows."
            )

    def _backward(
        self, streamed: StreamedModel, block: nn.Module, index: int, gradient: Tensor, calls: list[BlockCall]
    ) -> dict[str, Tensor]:
        """Mean squares of one block; `gradient` (windows, tokens, width) goes from its output to its input."""
        linears = {name: block.get_submodule(name) for name in streamed.adapter.linears}
        squares: dict[str, Tensor] = {}
        hooks = [linear.register_forward_hook(_square_into(squares, name)) for name, linear in linears.items()]
        try:
            with safe_open(self._inputs(index), "pt") as file, torch.enable_grad():
                stored = file.get_slice("hidden")
                for n, call in enumerate(calls):
                    start = stored[n : n + 1].to(gradient.device).requires_grad_()
                    call.run(block, start).backward(gradient[n : n + 1])
                    assert start.grad is not None
                    gradient[n] = start.grad[0]
        finally:
            for hook in hooks:
                hook.remove()
        self._inputs(index).unlink()
        return {name: square.div_(len(calls)).cpu() for name, square in squares.items()}

    def _file(self, index: int) -> Path:
        return self.folder / f"fisher-{index:05d}.safetensors"

    def _inputs(self, index: int) -> Path:
        return self.folder / f"inputs-{index:05d}.safetensors"


def rescale_fisher(F: Tensor, W: Tensor, scaled: Tensor) -> Tensor:
    """F of a weight after rows or columns of W were scaled: its gradient was divided by the same numbers."""
    return F * torch.where(scaled != 0, W / scaled, 1.0).square_()


def _square_into(squares: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """A forward hook: when the output's gradient G arrives, add (G^T X)^2 to squares[name].

    Weights ask for no gradient of their own, so none is kept for longer than its square takes; and the
    result is (out, in) whichever way round the module stores its weight.
    """

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        X = args[0].detach().flatten(0, -2)

        def arrived(G: Tensor) -> None:
            square = (G.flatten(0, -2).T @ X).square_()
            squares[name] = squares[name].add_(square) if name in squares else square

        output.register_hook(arrived)

    return hook


@torch.enable_grad()
def _loss_gradient(streamed: StreamedModel, tokens: Tensor, hidden: Tensor, loss_of: Loss) -> Tensor:
    """The gradient of the window's loss by the hidden states after the last block, (1, tokens, width)."""
    hidden = hidden.detach().clone().requires_grad_()
    loss = loss_of(tokens, streamed.head(tokens, hidden))
    if not bool(torch.isfinite(loss)):
        raise NumericsError("The model's loss on the calibration text is NaN or Inf; check the source's weights.")
    loss.backward()
    assert hidden.grad is not None
    return hidden.grad
