"""Prompts, as text or as a conversation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bitmill.evaluation.generate import chat_prompt, encode
from bitmill.evaluation.vocabulary import token_ids


@dataclass(frozen=True)
class Prompt:
    """A prompt for models with and without a chat template.

    text: continued by a model without one.
    turns: (role, content) of the conversation for a model with one; the text as the user's turn where left out.
    reply: beginning of the model's reply in this conversation.
    """

    text: str
    turns: tuple[tuple[str, str], ...] = ()
    reply: str = ""


def is_chat(tokenizer: Any) -> bool:
    """Return True if prompts are put to a model as a conversation: its tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def prompt_tokens(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Return the token ids of a prompt, as a conversation where the tokenizer has a chat template.

    Raises:
        UsageError: the chat template fails.
    """
    if not is_chat(tokenizer):
        return encode(tokenizer, prompt.text)
    turns = prompt.turns or (("user", prompt.text),)
    conversation = chat_prompt(tokenizer, [{"role": role, "content": content} for role, content in turns])
    return conversation + (token_ids(tokenizer, prompt.reply, add_special_tokens=False) if prompt.reply else [])
