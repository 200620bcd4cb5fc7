"""Statistics of the inputs of a block's linears, collected in one forward pass, and their order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.architectures.adapter import Adapter
from bitmill.architectures.experts import expert_of
from bitmill.calibration.experts import with_all_experts
from bitmill.errors import SourceError
from bitmill.models.block_call import BlockCall
from bitmill.numerics.gram import RunningGram
from bitmill.numerics.statistics import Statistics

_PreHook = Callable[[nn.Module, tuple[Any, ...]], None]


@torch.no_grad()
def collect_statistics(
    block: nn.Module, batches: list[Tensor], calls: list[BlockCall], leads: list[str], keeps: int = 0
) -> dict[str, Statistics]:
    """Return statistics of the inputs of some linears: the Gram matrix, and the magnitudes of channels.

    Args:
        block: module whose linears are observed.
        batches: hidden states (windows, tokens, width) before the block, batch by batch.
        calls: arguments with which the model calls the block, one per batch.
        leads: the linears, by path in the block.
        keeps: tokens of every input that are kept as they are, about.
    """
    running = {lead: RunningStatistics(keeps) for lead in leads}
    with _pre_hooks(block, {lead: stats.hook for lead, stats in running.items()}):
        for call, hidden in zip(calls, batches):
            call.run(block, hidden)
    return {lead: stats.result() for lead, stats in running.items()}


@torch.no_grad()
def collect_expert_averages(
    block: nn.Module, batches: list[Tensor], calls: list[BlockCall], leads: list[str]
) -> dict[str, Statistics]:
    """Return statistics of the inputs of all experts of each fused tensor together; empty without experts.

    Args:
        block, batches, calls: as for `collect_statistics`.
        leads: linears, by path in the block.
    """
    experts = {lead: found[0] for lead in leads if (found := expert_of(lead))}
    running = {fused: RunningStatistics(0) for fused in experts.values()}
    if running:
        with _pre_hooks(block, {lead: running[fused].hook for lead, fused in experts.items()}):
            for call, hidden in zip(calls, batches):
                call.run(block, hidden)
    return {fused: stats.result() for fused, stats in running.items()}


@torch.no_grad()
def find_stages(
    adapter: Adapter, block: nn.Module, hidden: Tensor, call: BlockCall, kept: Collection[str] = ()
) -> list[list[str]]:
    """Return the linears of a block in the order in which they run; those that read one tensor share a list.

    Adapters that were written for an architecture list them. Otherwise one window passes the block.

    Args:
        adapter: description of the architecture.
        block: the block.
        hidden: hidden states (1, tokens, width) before the block.
        call: arguments with which the model calls the block on them.
        kept: linears that stay in float, which need not run.

    Raises:
        SourceError: If another linear does not run, or takes its input by keyword: it cannot be calibrated.
    """
    if not adapter.inferred:
        return [list(stage) for stage in adapter.stages]
    inputs: list[tuple[str, Tensor]] = []  # tensors are kept: addresses of freed ones are used again
    paths = {path for path, _ in block.named_modules()}
    linears = [name for name in adapter.linears if name in paths]  # blocks may have different ones
    with _pre_hooks(block, {name: _input_hook(name, inputs) for name in linears}):
        call.run(block, hidden)
    idle = {name for name in linears if expert_of(name) is None} - {name for name, _ in inputs} - set(kept)
    if idle:
        raise SourceError(f"The linear layers {', '.join(sorted(idle))} do not run in their block's forward.")
    stages: list[list[str]] = []
    previous = None
    for name, X in inputs:
        view = X.data_ptr(), tuple(X.shape), X.stride()
        if stages and view == previous:
            stages[-1].append(name)
        else:
            stages.append([name])
        previous = view
    return with_all_experts(stages, linears)


@contextmanager
def recorded_inputs(block: nn.Module, linears: Collection[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Record the inputs of linears while a block runs inside a with-statement.

    Args:
        block: the block.
        linears: paths in the block.

    Yields:
        Path -> inputs (..., columns), a tensor for each call. Layers that read one tensor have one object.
    """
    calls: list[tuple[str, Tensor]] = []
    recorded: dict[str, list[Tensor]] = {name: [] for name in linears}
    with _pre_hooks(block, {name: _input_hook(name, calls) for name in linears}):
        yield recorded
    for name, X in calls:
        recorded[name].append(X)


class RunningStatistics:
    """Running statistics of the input X (tokens, channels) of one linear."""

    def __init__(self, keeps: int) -> None:
        self._keeps = keeps
        self.gram: RunningGram | None = None

    def hook(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Add a batch; a forward pre-hook."""
        X = args[0].reshape(-1, args[0].shape[-1]).to(torch.float32)
        if self.gram is None:
            self.gram = RunningGram(X.shape[1], X.device, self._keeps)
            self.sum_abs, self.max_abs = torch.zeros_like(X[0]), torch.zeros_like(X[0])
        self.gram.add(X)
        size = X.abs()
        self.sum_abs += size.sum(0)
        torch.maximum(self.max_abs, size.amax(0), out=self.max_abs)

    def result(self) -> Statistics:
        """Return the statistics of all batches."""
        if self.gram is None:  # an expert that no token was sent to
            return Statistics()
        tokens = self.gram.tokens
        return Statistics(
            self.gram.mean(),
            tokens,
            mean_abs=self.sum_abs / max(tokens, 1),
            max_abs=self.max_abs,
            samples=self.gram.samples,
        )


def _input_hook(name: str, inputs: list[tuple[str, Tensor]]) -> _PreHook:
    """Return a forward pre-hook that appends a linear's name and input to a list."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not args:
            raise SourceError(f"The linear layer {name!r} takes its input by keyword, which is not supported.")
        inputs.append((name, args[0]))

    return hook


@contextmanager
def _pre_hooks(block: nn.Module, hooks: dict[str, _PreHook]) -> Iterator[None]:
    """Register forward pre-hooks on modules of a block, by path, and remove them in the end."""
    handles = [block.get_submodule(name).register_forward_pre_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
