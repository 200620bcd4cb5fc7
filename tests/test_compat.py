"""Forward calls with a cache."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bitmill.compat import forward_with_cache

TOKENS = torch.tensor([[3]])


class Later:
    """As transformers calls it from 5.24 on."""

    def __call__(self, tokens: Tensor, cache: Any = None, use_cache: bool = False, **options: Any) -> Any:
        return SimpleNamespace(cache=[*(cache or []), int(tokens)], options=options)


class Earlier:
    def __call__(
        self, tokens: Tensor, past_key_values: Any = None, use_cache: bool = False, **options: Any
    ) -> Any:
        return SimpleNamespace(past_key_values=[*(past_key_values or []), int(tokens)], options=options)


class Without:
    def __call__(self, tokens: Tensor, **ignored: Any) -> Any:
        return SimpleNamespace()


@pytest.mark.parametrize("model", [Later(), Earlier()])
def test_cache_argument_name(model: Any) -> None:
    output, held = forward_with_cache(model, TOKENS, [1, 2], logits_to_keep=1)
    assert held == [1, 2, 3]
    assert output.options == {"logits_to_keep": 1}


def test_model_without_cache() -> None:
    assert forward_with_cache(Without(), TOKENS, None)[1] is None
