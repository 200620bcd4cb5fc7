"""Differences between releases of torch and transformers, and what neither of them offers publicly."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

CACHE_NAMES = ("cache", "past_key_values")  # names of the argument and of the output, later releases first


def cache_argument(arguments: Mapping[str, Any]) -> Any:
    """Return the cache among the keyword arguments of a model's forward, or None."""
    return next((arguments[name] for name in CACHE_NAMES if name in arguments), None)


def forward_with_cache(model: Any, tokens: Tensor, cache: Any, **options: Any) -> tuple[Any, Any]:
    """Run a model on tokens that follow those in a cache.

    Args:
        model: A causal language model of transformers, or any callable with that signature.
        tokens: Token ids (windows, length).
        cache: Cache with the preceding tokens, or None.
        **options: Further arguments of the call.

    Returns:
        The output of the model and the cache afterwards (None for a model without a cache).
    """
    kind: Any = type(model)
    output = model(tokens, **{_cache_name(kind): cache}, use_cache=True, **options)
    found = (getattr(output, name, None) for name in CACHE_NAMES)
    return output, next((one for one in found if one is not None), None)


@cache
def _cache_name(kind: type) -> str:
    parameters = inspect.signature(getattr(kind, "forward", kind.__call__)).parameters
    return next((name for name in CACHE_NAMES if name in parameters), CACHE_NAMES[-1])


def is_traced(x: Tensor | None = None) -> bool:
    """Return True while a compiler, a tracer, a function transform or a dispatch mode observes operations on x.

    torch has no public functions for the last two (torch.func transforms, TorchDispatchMode).
    """
    return (
        torch.compiler.is_compiling()
        or (x is not None and type(x) is not Tensor)
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


@contextmanager
def plain_meta_model() -> Iterator[None]:
    """Make models on the meta device without torch's reference implementations, whose import of sympy takes 35 MB.

    Weights of layers stay undrawn, and ranges, of which rotary frequencies are made, are computed in memory.
    from_pretrained fills both later.
    """
    kinds: dict[Any, Any] = {kind: kind.reset_parameters for kind in (nn.Linear, nn.Embedding)}
    arange = torch.arange
    for kind, own in kinds.items():
        kind.reset_parameters = lambda module, own=own: None if module.weight.is_meta else own(module)
    torch.arange = lambda *args, **options: arange(*args, **{"device": "cpu", **options})
    try:
        yield
    finally:
        torch.arange = arange
        for kind, own in kinds.items():
            kind.reset_parameters = own
