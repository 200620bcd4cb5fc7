"""One forward pass of a block that pauses where the input of each stage is ready.

True-sequential quantization needs the input of each linear as it is once the linears before it are quantized.
Running the block again for every stage costs several passes. Here each batch has a thread that runs the block's
forward up to the first linear of a stage, passes that linear's input to the caller and waits; when the stage is
quantized, it continues. All stages together cost one forward pass, and the live activations of every paused batch
in memory.

The threads take turns: one of them runs only while the caller waits for it, so no code needs a lock.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.architectures.experts import expert_of
from bitmill.errors import SourceError
from bitmill.models.block_call import BlockCall
from bitmill.models.meta import trim_malloc

# OpenMP starts a team of threads for each thread that computes. This bounds the teams of all passes of a block.
_MAX_COMPUTE_THREADS = 512


class StagedForward:
    """The forward passes of all batches through one block, advanced stage by stage.

    Use it as a context manager, or call `close`: both end every thread.
    """

    def __init__(self, block: nn.Module, batches: list[Tensor], calls: list[BlockCall], leads: list[str]) -> None:
        """Prepare the passes; nothing runs yet.

        Args:
            block: Module whose linears are quantized between the stages.
            batches: Hidden states (windows, tokens, width) before the block. Each is replaced by an empty tensor
                when its pass starts, so that the block alone decides how long it is needed.
            calls: Arguments with which the model calls the block, one per batch.
            leads: The first linear of each stage, by path in the block, in the order in which they run.
        """
        self._threads = torch.get_num_threads()
        team = min(self._threads, max(1, _MAX_COMPUTE_THREADS // max(1, len(calls))))
        self._passes = [_BatchForward(block, call, batches, number, team) for number, call in enumerate(calls)]
        modules = [(lead, block.get_submodule(lead)) for lead in leads]  # before a hook is left on any of them
        self._hooks = [module.register_forward_pre_hook(_pause_hook(lead)) for lead, module in modules]

    def __enter__(self) -> StagedForward:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def inputs(self, lead: str) -> Iterator[Tensor]:
        """Advance every batch to a stage and yield the input of its linears.

        Args:
            lead: The first linear of the stage.

        Yields:
            X (tokens, in), batch by batch.

        Raises:
            SourceError: If another linear runs before this one, or the block ends without it, unless it belongs to
                an expert that no token of the batch was sent to.
        """
        for batch in self._passes:
            reached, X = batch.reach()
            if reached == lead:
                batch.leave()
            elif expert_of(lead) is not None:
                continue  # none of its tokens were sent to this expert
            else:
                raise SourceError(
                    f"The linear layer {lead!r} was expected to run next in its block, but the block "
                    f"{'ended' if reached is None else f'reached {reached!r}'}; its adapter does not describe it."
                )
            yield X.reshape(-1, X.shape[-1])

    def outputs(self) -> list[Tensor]:
        """Run every batch to the end and return the hidden states after the block, batch by batch.

        Raises:
            SourceError: If a linear that leads a stage runs once more.
        """
        results = []
        for batch in self._passes:
            reached, hidden = batch.reach()
            if reached is not None:
                raise SourceError(f"The linear layer {reached!r} runs twice in its block, which is not supported.")
            results.append(hidden)
        return results

    def close(self) -> None:
        """Remove the hooks and end every thread, also those of paused passes."""
        for hook in self._hooks:
            hook.remove()
        for batch in self._passes:
            batch.cancel()
        for batch in self._passes:
            batch.wait()
        if any(batch.team < self._threads for batch in self._passes):
            torch.set_num_threads(self._threads)  # for threads that start later
        self._passes.clear()


class _Cancelled(BaseException):
    """Unwinds the stack of a paused pass that is no longer needed."""


class _BatchForward(threading.Thread):
    """The forward pass of one batch, in a thread that runs only while `advance` waits for it."""

    def __init__(self, block: nn.Module, call: BlockCall, batches: list[Tensor], number: int, team: int) -> None:
        super().__init__(name=f"bitmill-forward-{number}", daemon=True)
        self.ended, self.team = False, team
        self._reached: tuple[str | None, Any] | None = None
        self._block, self._call, self._batches, self._number = block, call, batches, number
        self._continue: SimpleQueue[bool] = SimpleQueue()  # to the thread; False ends it
        self._events: SimpleQueue[tuple[str | None, Any]] = SimpleQueue()  # from the thread
        # PyTorch keeps these for each thread
        self._grad, self._inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        device = batches[number].device
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def reach(self) -> tuple[str | None, Any]:
        """Return the path of the lead linear that is reached next and its input, None and the output at the end.

        The pass stays there until `leave`.
        """
        if self._reached is None:
            self._reached = self.advance()
        return self._reached

    def leave(self) -> None:
        """Go on from the lead linear that was reached, at the next `reach`."""
        self._reached = None

    def advance(self) -> tuple[str | None, Tensor]:
        """Run up to the next lead linear: its path and input, or None and the output of the block at the end.

        Raises what the block's forward raises, with its traceback.
        """
        assert not self.ended
        if self.ident is None:
            self.start()
        else:
            self._continue.put(True)
        reached, value = self._events.get()
        if not isinstance(value, BaseException):
            return reached, value
        try:
            raise value
        finally:
            del value  # its traceback holds this frame, which would keep the block's tensors

    def pause(self, lead: str, X: Tensor) -> None:
        """Pass the input of a lead linear to the caller and wait for the next `advance`."""
        self._report(lead, X)
        del X
        if not self._continue.get():
            raise _Cancelled

    def cancel(self) -> None:
        """Let the thread end at its next pause."""
        self._continue.put(False)

    def wait(self) -> None:
        """Return when the thread has ended."""
        if self.ident is not None:
            self.join()

    def run(self) -> None:
        """Run the block's forward; called in the thread."""
        if self.team < torch.get_num_threads():
            torch.set_num_threads(self.team)
        try:
            with (
                torch.inference_mode(self._inference),
                torch.set_grad_enabled(self._grad),
                torch.cuda.stream(self._stream),
            ):
                output = self._forward()
        except _Cancelled:
            return
        except BaseException as error:
            self.ended = True
            self._report(None, error)
        else:
            self.ended = True
            self._report(None, output)

    def _report(self, reached: str | None, value: Tensor | BaseException) -> None:
        trim_malloc()  # memory that one thread has freed is kept for that thread, and there is one for each batch
        self._events.put((reached, value))

    def _forward(self) -> Tensor:
        hidden = self._batches[self._number]
        self._batches[self._number] = hidden.new_empty(0)  # the block keeps what it needs of its input
        return self._call.run(self._block, hidden)


def _pause_hook(lead: str) -> Any:
    """Return a forward pre-hook that pauses the pass in whose thread it runs."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        thread = threading.current_thread()
        if isinstance(thread, _BatchForward):
            thread.pause(lead, args[0])

    return hook
