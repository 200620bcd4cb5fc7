"""Calibration text that a model writes itself, so that no text has to be chosen or downloaded.

A window starts with the tokenizer's prefix (such as <bos>), a token drawn uniformly from the vocabulary, and a few
greedy tokens, which fix a language and a subject. The rest is sampled from the distribution of the model. A model
may fall into a loop, which teaches little: windows that repeat themselves are written anew.

Source: LLM-QAT (Liu et al. 2023, arXiv 2305.17888), section 2.1; Norm Tweaking (arXiv 2309.02784), section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.compat import forward_with_cache
from bitmill.evaluation.generate import sample_tokens
from bitmill.progress import Progress

GREEDY_TOKENS = 4  # after the first token; the papers use 3 to 5
BATCH = 32  # windows generated at a time; another batch size draws other tokens
_TRIES = 3  # at most, for a window that repeats itself
_PASSAGE = 4  # tokens
_DISTINCT = 0.5  # least share of passages that differ from each other


@torch.no_grad()
def generate_windows(
    model: nn.Module,
    samples: int,
    seqlen: int,
    seed: int,
    special_tokens: Iterable[int],
    progress: Progress | None = None,
    prefix: tuple[int, ...] = (),
) -> Tensor:
    """Return token windows (samples, seqlen) int64 that a float model writes.

    Args:
        model: the model, in memory.
        samples: number of windows.
        seqlen: tokens of a window.
        seed: of all draws.
        special_tokens: tokens that no window starts with, such as padding.
        progress: where progress is reported.
        prefix: tokens with which every window starts; the first drawn token follows.

    Raises:
        NumericsError: The logits of the model are not finite.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    progress = progress or Progress()
    progress.start("writing text", -(-samples // BATCH) * (seqlen - 1 - len(prefix)))
    known, start = set(special_tokens), torch.tensor(prefix, dtype=torch.int64)

    def write(count: int, report: Progress) -> Tensor:
        """Return `count` windows."""
        drawn = _first_tokens(model, count, known, generator)
        tokens = torch.cat([start.expand(len(drawn), -1), drawn], 1)
        cache: Any = None
        while tokens.shape[1] < seqlen:
            unread = tokens if cache is None else tokens[:, -1:]
            output, cache = forward_with_cache(model, unread.to(device), cache)
            temperature = 0.0 if tokens.shape[1] - len(prefix) <= GREEDY_TOKENS else 1.0
            tokens = torch.cat([tokens, sample_tokens(output.logits[:, -1], temperature, generator)[:, None]], 1)
            report.advance()
        return tokens

    windows = torch.cat([write(min(BATCH, samples - first), progress) for first in range(0, samples, BATCH)])
    for _ in range(_TRIES):
        loops = [k for k, window in enumerate(windows.tolist()) if repeats_itself(window)]
        for first in range(0, len(loops), BATCH):
            batch = loops[first : first + BATCH]
            windows[batch] = write(len(batch), Progress())
    progress.finish()
    return windows


def repeats_itself(window: Sequence[int]) -> bool:
    """Return True for a window of tokens most of whose short passages occur more than once."""
    passages = [tuple(window[k : k + _PASSAGE]) for k in range(len(window) - _PASSAGE + 1)]
    return len(set(passages)) < _DISTINCT * len(passages)


def _first_tokens(model: nn.Module, count: int, special_tokens: set[int], generator: torch.Generator) -> Tensor:
    """Return first tokens (count, 1), drawn uniformly from the vocabulary without special tokens."""
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    allowed = torch.tensor([token for token in range(vocabulary) if token not in special_tokens])
    return allowed[torch.randint(len(allowed), (count, 1), generator=generator)]
