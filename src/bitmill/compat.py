"""Calls that go on from the tokens a cache holds, whatever the release of transformers names the cache."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import Tensor

CACHE_NAMES = ("cache", "past_key_values")  # of the argument and in the output, later releases first


def cache_argument(arguments: Mapping[str, Any]) -> Any:
    """The cache that a call is given, None for none."""
    return next((arguments[name] for name in CACHE_NAMES if name in arguments), None)


def forward_with_cache(model: Any, tokens: Tensor, held: Any, **options: Any) -> tuple[Any, Any]:
    """The output for tokens (windows, length) behind those in the cache `held`, and what the cache then is.

    held: None for none yet.  options: further arguments of the call.  Models that keep no cache give None back.
    """
    kind: Any = type(model)
    output = model(tokens, **{_argument(kind): held}, use_cache=True, **options)
    found = (getattr(output, name, None) for name in CACHE_NAMES)
    return output, next((one for one in found if one is not None), None)


@cache
def _argument(kind: type) -> str:
    known = inspect.signature(getattr(kind, "forward", kind.__call__)).parameters
    return next((name for name in CACHE_NAMES if name in known), CACHE_NAMES[-1])
