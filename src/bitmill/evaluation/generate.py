"""Generate text token by token, with the model's cache of keys and values."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bitmill.compat import forward_with_cache
from bitmill.errors import NumericsError, UsageError

PROMPT_CHUNK = 512  # tokens of a prompt that are read at a time into a packed cache


@dataclass(frozen=True)
class Generation:
    """What was generated. time_s includes reading the prompt; tokens_per_s is of the new tokens alone."""

    text: str
    tokens: list[int]
    stopped: Literal["eos", "length"]
    time_s: float
    tokens_per_s: float | None  # None where there is nothing to time: fewer than two tokens

    @property
    def new_tokens(self) -> int:
        """How many tokens were generated, the final end-of-text not counted."""
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
    chunk: int | None = None,
) -> Generation:
    """Continue `prompt` (token ids) until end of text, `max_new_tokens`, or the model's longest context.

    temperature: 0 takes the likeliest token, otherwise tokens are drawn from softmax(logits / temperature)
        with a generator of their own, seeded with `seed`.
    on_text: receives the text piece by piece, never half a character.
    past: an empty cache for the keys and values; the model makes its own without it.
    chunk: most tokens of the prompt that are read at a time, which takes a cache; all at once without it.
    Raises UsageError for a prompt the model cannot read, NumericsError when its logits are not finite.
    """
    check_can_generate(model)
    room = _check(model, prompt, max_new_tokens, temperature)
    ends = eos_tokens(model, tokenizer)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    pieces = _Pieces(tokenizer, on_text)
    tokens: list[int] = []
    stopped: Literal["eos", "length"] = "length"
    cache, unread = past, prompt
    started = time.perf_counter()
    first_done = started
    for step in range(min(max_new_tokens, room)):
        logits, cache = _read(model, torch.tensor([unread], device=device), cache, chunk)
        token = int(sample_tokens(logits, temperature, generator))
        if step == 0:
            first_done = time.perf_counter()
        if token in ends:
            stopped = "eos"
            break
        tokens.append(token)
        pieces.add(token)
        unread = [*prompt, *tokens] if cache is None else [token]
    pieces.end()
    ended = time.perf_counter()
    timed = len(tokens) - 1  # the first token is the prompt's time
    speed = timed / (ended - first_done) if timed > 0 else None
    return Generation(pieces.text, tokens, stopped, ended - started, speed)


def _read(model: nn.Module, tokens: Tensor, cache: Any, chunk: int | None) -> tuple[Tensor, Any]:
    """Logits (1, vocabulary) behind tokens (1, length) and what the cache then is, None for models without one."""
    output: Any = None
    for part in tokens.split(chunk or tokens.shape[1], 1):
        last = {"logits_to_keep": 1} if part.shape[1] > 1 and _keeps_last(model) else {}
        output, cache = forward_with_cache(model, part, cache, **last)
    return output.logits[:, -1], cache


def _keeps_last(model: nn.Module) -> bool:
    """Whether the model can be told to compute the last token's logits alone."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def check_can_generate(model: nn.Module, name: str = "") -> None:
    """Raises UsageError for a model that predicts no tokens, such as an encoder."""
    can_generate = getattr(model, "can_generate", None)
    if can_generate is not None and not can_generate():
        raise UsageError(
            f"{name or 'The model'} is a {type(model).__name__}, which predicts no tokens and so writes no text; "
            "give a language model."
        )


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a bare text, with whatever special tokens the tokenizer adds."""
    return list(tokenizer(text)["input_ids"])


def chat_prompt(tokenizer: Any, turns: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation that ends where the model is to answer.

    turns: {"role": "user" | "assistant" | "system", "content": text}. Raises UsageError when the chat template
    does not take them.
    """
    try:
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # templates are programs, and may refuse in any way
        said = " ".join(str(error).split()).rstrip(".")
        raise UsageError(f"The chat template cannot be applied ({said}); use --raw.") from None
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # the template has them already


def eos_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """Every token that ends a text, by the generation config, the config or the tokenizer."""
    ends: set[int] = set()
    for owner in (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer):
        value = getattr(owner, "eos_token_id", None)
        if isinstance(value, int):
            ends.add(value)
        elif isinstance(value, Iterable):
            ends |= {int(v) for v in value}
    return ends


def _check(model: nn.Module, prompt: list[int], max_new_tokens: int, temperature: float) -> int:
    """How many tokens fit behind the prompt. Raises UsageError."""
    if not prompt:
        raise UsageError("The prompt has no tokens; give some text.")
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens}; use at least 1.")
    if not 0 <= temperature < float("inf"):
        raise UsageError(f"temperature is {temperature}; use 0 (greedy) or a positive number.")
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(limit, int):
        return max_new_tokens
    if len(prompt) >= limit:
        raise UsageError(f"The prompt has {len(prompt)} tokens, and the model reads at most {limit}; shorten it.")
    return limit - len(prompt)


def sample_tokens(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Token ids (n,) from logits (n, vocabulary). Raises NumericsError when they are not finite."""
    logits = logits.float().cpu()
    if not bool(torch.isfinite(logits).any(-1).all()) or bool(torch.isnan(logits).any()):
        raise NumericsError("The model's logits are NaN or infinite, so it cannot generate; requantize it.")
    if temperature == 0:
        return logits.argmax(-1)
    # subtracting the maximum first keeps tiny temperatures finite
    probabilities = torch.softmax((logits - logits.amax(-1, keepdim=True)).double() / temperature, -1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


class _Pieces:
    """Decodes a growing list of tokens; a piece is given out once no later token can change it."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None) -> None:
        self.tokenizer, self.on_text = tokenizer, on_text
        self.tokens: list[int] = []
        self.text = ""
        self._context = self._given = 0  # tokens[_context:_given] are out; they give the next ones their spacing

    def add(self, token: int) -> None:
        self.tokens.append(token)
        self._give(final=False)

    def end(self) -> None:
        self._give(final=True)

    def _give(self, final: bool) -> None:
        before = self._decode(self.tokens[self._context : self._given])
        now = self._decode(self.tokens[self._context :])
        if len(now) <= len(before) or (now.endswith("\ufffd") and not final):
            return  # half a character: its other bytes come with the next token
        piece = now[len(before) :]
        self._context, self._given = self._given, len(self.tokens)
        self.text += piece
        if self.on_text:
            self.on_text(piece)

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))
