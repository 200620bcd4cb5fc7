"""Answers that are judged: greedy, up to a stop sequence; their numbers, and the share of right ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from torch import nn

from bitmill.evaluation.generate import generate
from bitmill.evaluation.intervals import exact_interval
from bitmill.evaluation.likelihood import mean
from bitmill.evaluation.prompt import Prompt, prompt_tokens
from bitmill.evaluation.prompt_cache import PromptCache

_NUMBER = re.compile(r"(?<!\d)-?\$?\d[\d,]*(?:\.\d+)?")


def answer(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt,
    stop_sequences: Sequence[str],
    max_new_tokens: int,
    prompt_cache: PromptCache | None = None,
) -> str:
    """Return the greedy answer, up to the first stop sequence, end of text, or the most tokens.

    Args:
        model: a language model.
        tokenizer: its tokenizer.
        prompt: the question.
        stop_sequences: texts that end an answer.
        max_new_tokens: most tokens of an answer.
        prompt_cache: of the questions before, whose examples are then not read again.

    Raises:
        UsageError: the model cannot generate from this prompt.
        NumericsError: the logits are not finite.
    """
    written: list[str] = []
    prompt_cache = prompt_cache or PromptCache(lambda: None)
    ids = prompt_tokens(tokenizer, prompt)
    past, read = prompt_cache.begin(ids)
    done = generate(
        model,
        tokenizer,
        ids,
        max_new_tokens=max_new_tokens,
        past=past,
        read=read,
        on_text=written.append,
        should_stop=lambda: _end("".join(written), stop_sequences) is not None,
    )
    prompt_cache.end(done.past, done.held)
    return done.text[: _end(done.text, stop_sequences)]


def _end(text: str, stop_sequences: Sequence[str]) -> int | None:
    """Return the position of the first stop sequence; None without any."""
    return min((at for stop in stop_sequences if (at := text.find(stop)) >= 0), default=None)


def final_number(text: str) -> Decimal | None:
    """Return the last number of a text, without dollar signs and commas; None where there is none."""
    numbers = _NUMBER.findall(text)
    return Decimal(re.sub("[,$]", "", numbers[-1])) if numbers else None


def share_figures(metric: str, right: Sequence[bool]) -> dict[str, Any]:
    """Return the share of right answers, its standard error, and its exact 95 % interval.

    Args:
        metric: name of the share.
        right: of every document.
    """
    share, error = mean([float(value) for value in right])
    interval = exact_interval(sum(right), len(right))
    return {metric: share, f"{metric}_stderr": error, f"{metric}_interval": interval}
