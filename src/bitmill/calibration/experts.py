"""Stages and statistics of the experts of a mixture, each of which sees the tokens that are sent to it alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bitmill.architectures.experts import expert_of
from bitmill.numerics.statistics import Statistics

Stages = list[list[str]]


def with_all_experts(stages: Stages, linears: Sequence[str]) -> Stages:
    """Return the stages of a block with those of experts that no token was sent to.

    Experts run as those that were seen: one expert after another, or one matrix of all experts after another.

    Args:
        stages: as observed on some tokens.
        linears: all linear layers of the block.
    """
    experts: dict[str, list[int]] = {}  # fused tensor -> its experts
    for name in linears:
        if found := expert_of(name):
            experts.setdefault(found[0], []).append(found[1])
    completed, done = Stages(), set[str]()
    for stage in stages:
        found = expert_of(stage[0])
        if found is None:
            completed.append(stage)
        elif found[0] not in done:
            observed = [s for s in stages if (other := expert_of(s[0])) and _owner(other[0]) == _owner(found[0])]
            done.update(fused for s in observed for fused, _ in map(_known, s))
            completed += _of_all_experts(observed, experts[found[0]])
    return completed


def _of_all_experts(observed: Stages, experts: Sequence[int]) -> Stages:
    """Return the stages of all experts of a mixture, from those of experts that were seen."""
    numbers = [_known(stage[0])[1] for stage in observed]
    pattern = [
        [_known(name)[0] for name in stage] for stage, number in zip(observed, numbers) if number == numbers[0]
    ]
    one_by_one = numbers == sorted(numbers)
    if one_by_one:
        return [[f"{fused}.expert{number}" for fused in stage] for number in experts for stage in pattern]
    return [[f"{fused}.expert{number}" for fused in stage] for stage in pattern for number in experts]


def _known(name: str) -> tuple[str, int]:
    found = expert_of(name)
    assert found is not None, name
    return found


def _owner(fused: str) -> str:
    return fused.rpartition(".")[0]


def pooled(stats: Sequence[Statistics]) -> Statistics | None:
    """Return the statistics of all experts together, None where no token was sent to any of them."""
    seen = [each for each in stats if each.gram is not None and each.tokens]
    tokens = sum(each.tokens for each in seen)
    if not tokens:
        return None
    shares = [each.tokens / tokens for each in seen]
    return Statistics(
        _weighted([each.gram for each in seen], shares),
        tokens,
        mean_abs=_weighted([each.mean_abs for each in seen], shares),
        max_abs=_max_of([each.max_abs for each in seen]),
    )


def shrink(stats: Statistics, average: Statistics) -> Statistics:
    """Return the statistics of an expert, shrunk towards the average over its layer by its number of tokens.

    The average counts as many tokens as the layer has input channels, so that an expert that no token was sent to
    has the average, and one with many tokens almost its own.

    Args:
        stats: of the expert; without a Gram matrix if no token was sent to it.
        average: of all experts of the layer.
    """
    assert average.gram is not None
    if stats.gram is None or not stats.tokens:
        return replace(average, tokens=0, cross=stats.cross)
    share = stats.tokens / (stats.tokens + len(average.gram))
    shares = (share, 1 - share)
    return replace(
        stats,
        gram=_weighted([stats.gram, average.gram], shares),
        mean_abs=_weighted([stats.mean_abs, average.mean_abs], shares),
        max_abs=_max_of([stats.max_abs, average.max_abs]),
    )


def shrink_all(stats: Mapping[str, Statistics]) -> dict[str, Statistics]:
    """Return statistics by linear layer, those of experts shrunk towards the average over their layer."""
    members: dict[str, list[Statistics]] = {}
    for name, each in stats.items():
        if found := expert_of(name):
            members.setdefault(found[0], []).append(each)
    averages = {fused: pooled(each) for fused, each in members.items()}
    return {
        name: shrink(each, average) if (found := expert_of(name)) and (average := averages[found[0]]) else each
        for name, each in stats.items()
    }


def fill_idle_experts(fisher: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return Fisher diagonals by linear layer, where experts without any have the mean of their layer's others."""
    known: dict[str, list[Tensor]] = {}
    for name, square in fisher.items():
        if (found := expert_of(name)) and bool(square.any()):
            known.setdefault(found[0], []).append(square)
    return {
        name: torch.stack(known[found[0]]).mean(0)
        if (found := expert_of(name)) and found[0] in known and not bool(square.any())
        else square
        for name, square in fisher.items()
    }


def _weighted(tensors: Sequence[Tensor | None], shares: Sequence[float]) -> Tensor | None:
    """Return the weighted sum; None where a tensor was not collected."""
    total: Tensor | None = None
    for tensor, share in zip(tensors, shares, strict=True):
        if tensor is None:
            return None
        total = tensor * share if total is None else total.add_(tensor, alpha=share)
    return total


def _max_of(tensors: Sequence[Tensor | None]) -> Tensor | None:
    known = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(known).amax(0) if known else None
