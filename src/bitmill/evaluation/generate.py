"""Text generation, token by token with a cache of keys and values."""

from __future__ import annotations

import inspect
import operator
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bitmill.compat import forward_with_cache
from bitmill.config.arguments import check_characters, check_seed
from bitmill.errors import NumericsError, UsageError, one_line, quoted
from bitmill.evaluation.context import context_length
from bitmill.evaluation.vocabulary import outside_vocabulary, token_ids

PROMPT_CHUNK = 512  # tokens of a prompt that run at a time where the cache is packed


@dataclass(frozen=True)
class Generation:
    """A generated text.

    text, tokens: without the prompt and the end-of-text token.
    stopped: at end of text, at the most tokens, or because `should_stop` said so.
    time_s: seconds, including those for the prompt.
    tokens_per_s: of the tokens after the first one; None for fewer than two tokens.
    starts: the place in the text, in characters, where each token begins; a token that completes no character
        begins where the next one does.
    past, held: the cache afterwards, and the tokens whose keys and values it holds; None and none for models
        without one.
    """

    text: str
    tokens: list[int]
    stopped: Literal["eos", "length", "interrupt"]
    time_s: float
    tokens_per_s: float | None
    starts: list[int]
    past: Any = field(default=None, repr=False)
    held: list[int] = field(default_factory=list, repr=False)

    @property
    def new_tokens(self) -> int:
        """Number of generated tokens, without the end-of-text token."""
        return len(self.tokens)


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: list[int],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
    past: Any = None,
    read: int = 0,
    chunk: int | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Generation:
    """Generate from a prompt until end of text, `max_new_tokens`, or the longest context of the model.

    Args:
        model: a language model.
        tokenizer: its tokenizer.
        prompt: token ids.
        max_new_tokens: most tokens to generate.
        temperature: 0 for greedy decoding; otherwise tokens are drawn from softmax(logits / temperature).
        seed: of the generator for these draws.
        on_text: receives the text in pieces of whole characters.
        past: a cache of keys and values; the model makes its own without it.
        read: tokens of the prompt that `past` holds already.
        chunk: most tokens of the prompt that run at a time, which needs a cache; all at once without it.
        should_stop: asked before every token; the text ends there where it returns True.

    Raises:
        UsageError: The model cannot generate from this prompt.
        NumericsError: The logits are not finite.
    """
    check_can_generate(model)
    check_seed(seed, UsageError)
    limit = min(max_new_tokens, _remaining_context(model, prompt, max_new_tokens, temperature))
    eos = eos_tokens(model, tokenizer)
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(seed)
    text = _TextStreamer(tokenizer, on_text)
    tokens: list[int] = []
    starts: list[int] = []
    stopped: Literal["eos", "length", "interrupt"] = "length"
    cache, unread = past, prompt[read:]
    started = first_token_at = time.perf_counter()
    for step in range(limit):
        if should_stop is not None and should_stop():
            stopped = "interrupt"
            break
        logits, cache = _next_logits(model, torch.tensor([unread], device=device), cache, chunk)
        unread = []
        token = int(sample_tokens(logits, temperature, generator))
        if step == 0:
            first_token_at = time.perf_counter()
        if token in eos:
            stopped = "eos"
            break
        tokens.append(token)
        starts.append(len(text.text))
        text.add(token)
        unread = [*prompt, *tokens] if cache is None else [token]
    text.end()
    ended = time.perf_counter()
    timed = len(tokens) - 1  # the time of the first token is that of the prompt
    speed = timed / (ended - first_token_at) if timed > 0 else None
    seen = [*prompt, *tokens]
    held = [] if cache is None else seen[: len(seen) - len(unread)]
    return Generation(text.text, tokens, stopped, ended - started, speed, starts, cache, held)


def _next_logits(model: nn.Module, tokens: Tensor, cache: Any, chunk: int | None) -> tuple[Tensor, Any]:
    """Run tokens (1, length) through the model.

    Returns:
        Logits (1, vocabulary) after the last token, and the cache; None for models without one.
    """
    output: Any = None
    for part in tokens.split(chunk or tokens.shape[1], 1):
        last = {"logits_to_keep": 1} if part.shape[1] > 1 and _supports_logits_to_keep(model) else {}
        output, cache = forward_with_cache(model, part, cache, **last)
    return output.logits[:, -1], cache


def _supports_logits_to_keep(model: nn.Module) -> bool:
    """Return True if the model can compute the logits of the last token alone."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def check_can_generate(model: nn.Module, name: str = "") -> None:
    """Raise UsageError for a model that predicts no tokens, such as an encoder.

    Args:
        model: the model.
        name: its name for the message.
    """
    can_generate = getattr(model, "can_generate", None)
    if can_generate is not None and not can_generate():
        raise UsageError(
            f"{name or 'The model'} is a {type(model).__name__}, which predicts no tokens and writes "
            "no text; give a language model."
        )


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text, with the special tokens that the tokenizer adds. Raises UsageError."""
    check_characters(text, "The prompt", UsageError)
    return token_ids(tokenizer, text)


def chat_prompt(tokenizer: Any, turns: list[dict[str, str]]) -> list[int]:
    """Return the token ids of a conversation, up to where the reply of the model starts.

    Args:
        tokenizer: tokenizer with a chat template.
        turns: {"role": "user" | "assistant" | "system", "content": text} each.

    Raises:
        UsageError: The chat template fails.
    """
    for turn in turns:
        check_characters(turn["content"], "The prompt", UsageError)
    try:
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template is a program and can raise anything
        raise UsageError(f"The chat template cannot be applied ({one_line(error)}); use --raw.") from None
    return token_ids(tokenizer, text, add_special_tokens=False)  # the template contains special tokens


def eos_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """Return all tokens that end a text.

    Args:
        model: its generation config and config name some.
        tokenizer: names others.

    Raises:
        UsageError: a config gives no token ids.
    """
    eos: set[int] = set()
    for owner in (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer):
        value: Any = getattr(owner, "eos_token_id", None)
        several = isinstance(value, Iterable) and not isinstance(value, str)
        try:
            eos |= {operator.index(token) for token in (value if several else [value]) if token is not None}
        except TypeError:
            raise UsageError(
                f"The {type(owner).__name__} gives eos_token_id as {quoted(value)}; it must be a token id or a "
                "list of them."
            ) from None
    return eos


def _remaining_context(model: nn.Module, prompt: list[int], max_new_tokens: int, temperature: float) -> int:
    """Return the number of tokens that fit into the context after the prompt. Raises UsageError."""
    if not prompt:
        raise UsageError("The prompt has no tokens; give some text.")
    if reason := outside_vocabulary(getattr(model, "config", None), torch.tensor(prompt)):
        raise UsageError(f"The prompt holds {reason}; use the model's own tokenizer.")
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens}; use at least 1.")
    if not 0 <= temperature < float("inf"):
        raise UsageError(f"temperature is {temperature}; use 0 (greedy) or a positive number.")
    limit = context_length(getattr(model, "config", None))
    if limit is None:
        return max_new_tokens
    if len(prompt) >= limit:
        raise UsageError(
            f"The prompt has {len(prompt)} tokens, and the context of the model has {limit}; shorten it."
        )
    return limit - len(prompt)


def sample_tokens(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Return token ids (n,) from logits (n, vocabulary).

    Args:
        logits: (n, vocabulary).
        temperature: 0 for the most likely token, else the tokens are drawn from softmax(logits / temperature).
        generator: for these draws.

    Raises:
        NumericsError: The logits are not finite.
    """
    logits = logits.float().cpu()
    if not bool(torch.isfinite(logits).any(-1).all()) or bool(torch.isnan(logits).any()):
        raise NumericsError("The logits are NaN or infinite, so the model cannot generate; quantize it again.")
    if temperature == 0:
        return logits.argmax(-1)
    # subtracting the maximum first keeps small temperatures finite
    probabilities = torch.softmax((logits - logits.amax(-1, keepdim=True)).double() / temperature, -1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


class _TextStreamer:
    """Decodes a growing list of tokens in pieces that no later token can change."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None) -> None:
        self.tokenizer, self.on_text = tokenizer, on_text
        self.tokens: list[int] = []
        self.text = ""
        # tokens[_context:_emitted] are emitted already; the next ones are decoded after them for their spaces
        self._context = self._emitted = 0

    def add(self, token: int) -> None:
        """Add a token, and emit text where it completes a character."""
        self.tokens.append(token)
        self._emit(final=False)

    def end(self) -> None:
        """Emit the rest."""
        self._emit(final=True)

    def _emit(self, final: bool) -> None:
        before = self._decode(self.tokens[self._context : self._emitted])
        now = self._decode(self.tokens[self._context :])
        if len(now) <= len(before) or (now.endswith("\ufffd") and not final):
            return  # half a character, whose other bytes are in the next token
        piece = now[len(before) :]
        self._context, self._emitted = self._emitted, len(self.tokens)
        self.text += piece
        if self.on_text:
            self.on_text(piece)

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))
