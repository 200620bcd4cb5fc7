"""Prompts through the compiled model, in pieces of many tokens, without Python between layers (csrc/step)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from bitmill.native import threads, unsupported_reason
from bitmill.runtime.activations import activations
from bitmill.runtime.decode.plan import Plan
from bitmill.runtime.decode.step_cache import float_prompt_cache

PIECE_TOKENS = 512  # that pass a block together
PROBE_TOKENS = 32  # of the first prompt, which transformers reads too


class PromptCache(Protocol):
    """A cache of one sequence, which a prompt extends.

    Attributes:
        length: Number of tokens in the cache.
    """

    length: int

    def make_room(self, tokens: int) -> None:
        """Make room for tokens."""

    def arguments(self) -> tuple[Any, ...]:
        """Return the arguments of a compiled model's `read` that hold keys and values (csrc/bind_decoder.cpp)."""

    def advance(self, tokens: int) -> None:
        """Increase the length by the tokens that the compiled model has appended."""

    def finish(self) -> None:
        """Complete the cache after the last token of a prompt."""


def prompt_cache(cache: Any, plan: Plan, tokens: int) -> PromptCache | None:
    """Return the interface to a cache that a prompt extends; None if transformers must read the prompt.

    Args:
        cache: The cache, empty or of one sequence.
        plan: The compiled model.
        tokens: Number of tokens of the prompt.
    """
    offered: Any = getattr(cache, "decode_step_cache", None)
    if offered is None:
        return float_prompt_cache(cache, plan.windows, plan.kv_heads, plan.dim, plan.dtype)
    if plan.packed_unsupported_reason() is not None:
        return None
    packed: PromptCache | None = offered().prompt(len(plan.windows), plan.kv_heads, plan.dim, tokens, plan.dtype)
    return packed


def prompt_unsupported_reason(plan: Plan) -> str | None:
    """Return a phrase if a layer of the model multiplies single tokens only, or None."""
    if (missing := unsupported_reason("Codes")) is not None:
        return missing[:1].lower() + missing[1:].rstrip(".")
    with _prepared(plan):
        return None if plan.model.reads_pieces() else "the kernel of a layer multiplies single tokens only"


def read_prompt(plan: Plan, ids: Tensor, past: PromptCache, kept: int) -> Tensor:
    """Read a prompt, and append its keys and values to a cache.

    Args:
        plan: The compiled model.
        ids: Token ids (1, tokens).
        past: The cache.
        kept: Number of tokens, the last ones, whose logits are returned; 0 for all.

    Returns:
        fp32 (kept, vocabulary).
    """
    count = ids.shape[1]
    rows, angles = plan.inputs(ids, past.length)
    logits = torch.empty(min(kept or count, count), plan.tokens)
    pieces = -(-count // PIECE_TOKENS)
    floats = activations().many == "float32"
    with _prepared(plan):
        for piece in range(pieces):  # of about as many tokens each
            first, last = count * piece // pieces, count * (piece + 1) // pieces
            past.make_room(last - first)
            wanted = logits[max(0, first - count + len(logits)) : max(0, last - count + len(logits))]
            cos, sin = (part[first:last] for part in angles)
            plan.model.read(rows[first:last], cos, sin, *past.arguments(), wanted, floats, threads())
            past.advance(last - first)
    past.finish()
    return logits


def first_difference(plan: Plan, own: Any, ids: Tensor, config: Any) -> float:
    """Compare the logits after the first tokens of a prompt with those of transformers.

    Args:
        plan: The compiled model.
        own: The model's own forward.
        ids: Token ids (1, tokens).
        config: Of the model.

    Returns:
        The norm of the difference, relative to the spread of the logits.
    """
    some = ids[:, :PROBE_TOKENS]
    past = prompt_cache(new_cache(config), plan, some.shape[1])
    assert past is not None
    found = read_prompt(plan, some, past, 1)[0]
    expected = own(input_ids=some, use_cache=False, logits_to_keep=1).logits[0, -1].to(torch.float32)
    return float((found - expected).norm() / (expected - expected.mean()).norm())


def new_cache(config: Any) -> Cache:
    """Return an empty cache, as transformers makes one for a model with this config."""
    return DynamicCache(config=config)


@contextmanager
def _prepared(plan: Plan) -> Iterator[None]:
    """Give the layers' kernels what they multiply many tokens with, until the end of a prompt."""
    with ExitStack() as stack:
        for kernel in plan.kernels:
            stack.enter_context(kernel.reading_prompt())
        yield
