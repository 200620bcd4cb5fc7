"""One forward pass of a block that stops where each stage's input is ready.

True-sequential quantization wants, for each linear of a block, the input it receives once the linears
before it are quantized. Running the block anew for every stage costs several passes. Here the forward of
every batch is a coroutine (a greenlet): it runs to the first linear of a stage, hands that input over and
sleeps; when the stage is quantized it goes on from there. All stages together cost one forward pass, at
the price of keeping each sleeping batch's live activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from bitmill.architectures.adapter import Adapter
from bitmill.errors import SourceError
from bitmill.models.block_call import BlockCall


class StagedForward:
    """The forward passes of all batches through one block, advanced stage by stage.

    leads: the linear of each stage whose input stands for the stage, in the order in which they run.
    """

    def __init__(self, block: nn.Module, batches: list[Tensor], calls: list[BlockCall], leads: list[str]) -> None:
        self._leads = leads
        self._hooks = [block.get_submodule(name).register_forward_pre_hook(self._pause(name)) for name in leads]
        self._runs = [greenlet(_runner(block, call, batches, i)) for i, call in enumerate(calls)]

    @staticmethod
    def _pause(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            parent = getcurrent().parent
            if parent is not None:
                parent.switch((name, args[0]))

        return hook

    def inputs(self, lead: str) -> Iterator[Tensor]:
        """Advance every batch to `lead` and yield its input, X (tokens, in)."""
        for run in self._runs:
            reached, X = run.switch() if not run.dead else ("", None)
            if reached != lead or X is None:
                raise SourceError(
                    f"The linear layer {lead!r} was expected to run next in its block, but the block "
                    f"{'ended' if run.dead else f'reached {reached!r}'}; its adapter does not describe it."
                )
            yield X.reshape(-1, X.shape[-1])

    def outputs(self) -> list[Tensor]:
        """Run every batch to its end and return the hidden states, batch by batch."""
        results = []
        for run in self._runs:
            kind, value = run.switch()
            if not run.dead or kind != "end":
                raise SourceError(f"The linear layer {kind!r} runs twice in its block, which is not supported.")
            results.append(value)
        return results

    def close(self) -> None:
        """Remove the hooks and drop whatever still sleeps."""
        for hook in self._hooks:
            hook.remove()
        self._runs.clear()


def _runner(block: nn.Module, call: BlockCall, batches: list[Tensor], index: int) -> Any:
    def body() -> tuple[str, Tensor]:
        hidden = batches[index]
        batches[index] = hidden.new_empty(0)  # the block keeps what it needs of its input
        return "end", call.run(block, hidden)

    return body


@torch.no_grad()
def find_stages(adapter: Adapter, block: nn.Module, hidden: Tensor, call: BlockCall) -> list[list[str]]:
    """The linears of a block in the order in which they run; those that read the same tensor share a list.

    Known architectures say so in their adapter. For a generic walk, one window is sent through the block.
    Raises SourceError for a linear that does not run, which calibration could say nothing about.
    """
    if not adapter.inferred:
        return [list(stage) for stage in adapter.stages]
    order: list[tuple[str, tuple[Any, ...], Any]] = []

    def watch(name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not args:
                raise SourceError(f"The linear layer {name!r} takes its input by keyword, which is not supported.")
            X = args[0]
            order.append((name, (X.data_ptr(), tuple(X.shape), X.stride()), X))  # X kept: addresses are reused

        return note

    hooks = [block.get_submodule(n).register_forward_pre_hook(watch(n)) for n in adapter.linears]
    try:
        call.run(block, hidden)
    finally:
        for hook in hooks:
            hook.remove()
    idle = set(adapter.linears) - {name for name, _, _ in order}
    if idle:
        raise SourceError(f"The linear layers {', '.join(sorted(idle))} do not run in their block's forward.")
    stages: list[list[str]] = []
    previous = None
    for name, place, _ in order:
        if stages and place == previous:
            stages[-1].append(name)
        else:
            stages.append([name])
        previous = place
    return stages
