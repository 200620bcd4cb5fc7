"""Calibration text that a model writes itself: nothing is downloaded, and nobody's text has to be chosen.

A window starts with a token drawn evenly from the vocabulary, goes on with the likeliest tokens, which settle
on a language and a subject, and is then drawn from the model's own distribution.

Source: LLM-QAT (Liu et al. 2023, arXiv 2305.17888), section 2.1; Norm Tweaking (arXiv 2309.02784), section 3.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.compat import forward_with_cache
from bitmill.evaluation.generate import sample_tokens
from bitmill.progress import Progress

LIKELIEST = 4  # tokens after the first one; the papers say 3 to 5
BATCH = 32  # windows written at a time; a matter of memory and speed, though other batches draw other tokens


@torch.no_grad()
def generate_windows(
    model: nn.Module, samples: int, seqlen: int, seed: int, never: Iterable[int], progress: Progress | None = None
) -> Tensor:
    """Token windows (samples, seqlen) int64 by a float model in memory.

    never: tokens that no window starts with, such as padding.
    Raises NumericsError when the model's logits are not finite.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    progress = progress or Progress()
    progress.start("writing text", -(-samples // BATCH) * (seqlen - 1))
    windows = []
    for start in range(0, samples, BATCH):
        tokens = _first(model, min(BATCH, samples - start), set(never), generator)
        cache: Any = None
        while tokens.shape[1] < seqlen:
            known = tokens if cache is None else tokens[:, -1:]
            output, cache = forward_with_cache(model, known.to(device), cache)
            temperature = 0.0 if tokens.shape[1] <= LIKELIEST else 1.0
            tokens = torch.cat([tokens, sample_tokens(output.logits[:, -1], temperature, generator)[:, None]], 1)
            progress.advance()
        windows.append(tokens)
    progress.finish()
    return torch.cat(windows)


def _first(model: nn.Module, count: int, never: set[int], generator: torch.Generator) -> Tensor:
    """First tokens (count, 1), evenly from those that may be first."""
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    allowed = torch.tensor([token for token in range(vocabulary) if token not in never])
    return allowed[torch.randint(len(allowed), (count, 1), generator=generator)]
