"""The Fisher diagonal: the sensitivity of the model's own loss to each single weight.

    F = mean over windows of (d loss / d W)^2        loss: mean next-token cross entropy of one window;
                                                     of an encoder u e, e its embedding, u drawn from N(0, I)

One backward pass per window, through a model of which one block is in memory at a time: a float forward pass
writes the inputs of every block to disk; then the blocks, from last to first, run again and receive the gradient
of their output. Squares are summed in fp32 (a weight's square is of the order of 1e-10, which half types round to
zero); results are written to disk too, so memory does not grow with depth.

The gradient is averaged over a window's tokens before it is squared, as in SqueezeLLM (arXiv 2306.07629,
section 4.1 and its published gradient code), so this is no Fisher matrix of single tokens. An encoder has no
tokens to predict; the mean over u of (d u e / d W)^2 is |d e / d W|^2, how far a small change of W moves the
embedding, which is the Fisher diagonal of a model that answers e and noise.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from bitmill.calibration.walk import HiddenStates, walk_blocks
from bitmill.errors import CalibrationError, NumericsError, OutputError, one_line
from bitmill.files import make_folder, output_errors, write_tensors
from bitmill.models.block_call import BlockCall
from bitmill.models.streamed import StreamedModel
from bitmill.progress import Progress
from bitmill.recorded_tensors import read_recorded, write_recorded
from bitmill.tasks.base import Loss

_META = "bitmill_fisher"
_UNRECORDED = ("format",)  # metadata of earlier versions
WINDOWS = 100  # most windows that are read; the published figures use 100


class Fisher:
    """The Fisher diagonal of every linear of every block, kept in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def block(self, index: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Return F, fp32 (out, in), of every linear of a block, by its path in the block.

        Raises:
            CalibrationError: the file is damaged.
        """
        path = self._file(index)
        try:
            squares, _ = read_recorded(path, _META, _UNRECORDED)
            return {name: square.to(device) for name, square in squares.items()}
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CalibrationError(
                f"The squared gradients in {path} cannot be read ({one_line(error)}); delete {self.folder}."
            ) from None

    @property
    def complete(self) -> bool:
        """Return True if all blocks are there: the first block's file is written last."""
        return self._file(0).exists()

    def measure(self, streamed: StreamedModel, windows: Tensor, progress: Progress) -> None:
        """Fill the folder.

        Args:
            streamed: the float model.
            windows: token ids (windows, length), of which the first WINDOWS are used.
            progress: advanced by two for each block.

        Raises:
            NumericsError: If the model's loss is NaN or Inf.
            OutputError: If the folder has too little space.
        """
        windows = windows[:WINDOWS]
        with output_errors(self.folder):
            make_folder(self.folder)
        progress.start("Fisher information", 2 * len(streamed.blocks))
        with streamed.non_block_weights("embedding"):
            states = HiddenStates(streamed, windows.split(1))
        self._check_space(streamed, sum(hidden.nbytes for hidden in states.batches))
        for index, block in walk_blocks(streamed, progress):
            write_tensors(
                self._inputs(index),
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
            squares = self._backward(streamed, block, index, gradients, states.calls(index))
            write_recorded(self._file(index), _META, squares, {"windows": len(windows)}, shared=True)

    def _check_space(self, streamed: StreamedModel, hidden_bytes: int) -> None:
        """Raise OutputError if the folder cannot hold the inputs of all blocks and the result."""
        names = [
            f"{streamed.block_name(index)}.{linear}.weight"
            for index in range(len(streamed.blocks))
            for linear in streamed.adapter.linears
        ]
        needed = len(streamed.blocks) * hidden_bytes + sum(4 * math.prod(streamed.shape(name)) for name in names)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OutputError(
                f"Squared gradients need {needed / 1e6:.0f} MB and {self.folder} has {free / 1e6:.0f} MB free; "
                "free some space, or calibrate on fewer windows."
            )

    def _backward(
        self,
        streamed: StreamedModel,
        block: nn.Module,
        index: int,
        gradients: list[Tensor],
        calls: list[BlockCall],
    ) -> dict[str, Tensor]:
        """Return the mean squared gradients of one block's linears.

        Args:
            streamed: the float model.
            block: block `index`, with float weights.
            index: its index.
            gradients: gradients of the loss by the block's output (1, tokens, width), window by window; replaced
                by those by its input.
            calls: arguments with which the model calls the block, window by window.
        """
        linears = {name: block.get_submodule(name) for name in streamed.adapter.linears}
        squares: dict[str, Tensor] = {}
        hooks = [linear.register_forward_hook(_square_into(squares, name)) for name, linear in linears.items()]
        try:
            with safe_open(self._inputs(index), "pt") as file, torch.enable_grad():
                for n, call in enumerate(calls):
                    start = file.get_tensor(str(n)).to(gradients[n].device).requires_grad_()
                    call.run(block, start).backward(gradients[n])
                    assert start.grad is not None
                    gradients[n] = start.grad
        finally:
            for hook in hooks:
                hook.remove()
        self._inputs(index).unlink(missing_ok=True)
        return {name: square.div_(len(calls)).cpu() for name, square in squares.items()}

    def _file(self, index: int) -> Path:
        return self.folder / f"fisher-{index:05d}.safetensors"

    def _inputs(self, index: int) -> Path:
        return self.folder / f"inputs-{index:05d}.safetensors"


def rescale_fisher(F: Tensor, W: Tensor, scaled: Tensor) -> Tensor:
    """Return the Fisher diagonal of a weight whose rows or columns were scaled.

    Args:
        F: Fisher diagonal of W, (out, in).
        W: the weight before, (out, in).
        scaled: the weight after; its gradients are those of W divided by the scales.
    """
    return F * torch.where(scaled != 0, W / scaled, 1.0).square_()


def _square_into(squares: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """Return a forward hook that adds (G^T X)^2 to squares[name] when the output's gradient G arrives.

    Weights do not require gradients of their own, so none is kept for longer than its square takes; and the result
    is (out, in), also where the module stores its weight as (in, out).
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
    """Return the gradient of a window's loss by the hidden states after the last block, (1, tokens, width)."""
    hidden = hidden.detach().clone().requires_grad_()
    loss = loss_of(tokens, streamed.head(tokens, hidden))
    if not bool(torch.isfinite(loss)):
        raise NumericsError("The model's loss on the calibration text is NaN or Inf; check the source's weights.")
    loss.backward()
    assert hidden.grad is not None
    return hidden.grad
