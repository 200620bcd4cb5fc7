"""Keys and values that the next prompt of a conversation goes on with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bitmill.errors import UsageError

_CANNOT_CROP = (AttributeError, NotImplementedError, RuntimeError, UsageError, ValueError)


class PromptCache:
    """Keeps the cache of the last prompt and its answer, so that a longer prompt is read from where they differ.

    Args:
        new: returns an empty cache; None for the model's own.
        reuse: False where the model's other states cannot be continued by several tokens exactly: every prompt is
            then read from its beginning.
    """

    def __init__(self, new: Callable[[], Any], reuse: bool = True) -> None:
        self._new, self._reuse = new, reuse
        self._past: Any = None
        self._tokens: list[int] = []  # that `_past` holds

    def begin(self, prompt: list[int]) -> tuple[Any, int]:
        """Return a cache, and the number of the prompt's first tokens that it holds: all but one at most.

        The cache is the caller's until `end`, so an error in between leaves none.
        """
        past, tokens = self._past, self._tokens
        self._past, self._tokens = None, []
        common = _common_prefix(tokens, prompt[:-1])
        if past is None or not common:
            return self._new(), 0
        if common < len(tokens):
            try:
                past.crop(common - len(tokens))
            except _CANNOT_CROP:  # tokens beyond a sliding window are gone
                return self._new(), 0
        return past, common

    def end(self, past: Any, tokens: list[int]) -> None:
        """Keep a cache and the tokens that it holds."""
        if self._reuse and past is not None:
            self._past, self._tokens = past, tokens


def _common_prefix(a: list[int], b: list[int]) -> int:
    """Return the number of equal tokens at the beginning of both."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
