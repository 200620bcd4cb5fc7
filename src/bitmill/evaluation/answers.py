"""Greedy answers of a model to prompts, as records for reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from bitmill.evaluation.generate import generate
from bitmill.evaluation.prompt import Prompt, prompt_tokens
from bitmill.progress import Progress

PROMPTS = (
    "What is the capital of France?",
    "Explain in one sentence why the sky is blue.",
    "Write a Python function that reverses a string.",
)
NEW_TOKENS = 48


def answer_prompts(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, progress: Progress
) -> list[dict[str, Any]]:
    """Answer prompts greedily, as a chat where the tokenizer has a template, else as a continuation.

    Args:
        model: a language model.
        tokenizer: its tokenizer.
        prompts: the texts of a user.
        max_new_tokens: most tokens of an answer.
        progress: advances with each prompt.

    Returns:
        For each prompt `text`, `new_tokens`, `stopped` ("eos" or "length"), `token_ids`, and `token_starts`: the
        place in the text, in characters, where each token begins.
    """
    progress.start("answer", len(prompts))
    answers = []
    for prompt in prompts:
        ids = prompt_tokens(tokenizer, Prompt(prompt))
        done = generate(model, tokenizer, ids, max_new_tokens=max_new_tokens)
        answers.append(
            {
                "text": done.text,
                "new_tokens": done.new_tokens,
                "stopped": done.stopped,
                "token_ids": done.tokens,
                "token_starts": done.starts,
            }
        )
        progress.advance()
    progress.finish()
    return answers
