"""lm-eval computes the log-likelihoods of answers: it tokenizes, batches, and truncates contexts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from bitmill.errors import UsageError

INSTALL = 'pip install "bitmill[tasks]"'


def require_lm_eval() -> None:
    """Import lm-eval, before anything takes time. Raises UsageError where it is missing."""
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"Tasks are scored through lm-eval, which cannot be imported ({error}); install it with: {INSTALL}"
        ) from None


def log_likelihoods(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    batch_size: int,
    on_scored: Callable[[], None],
) -> list[tuple[float, bool]]:
    """Return the log-likelihood of every continuation, in nats, and True where greedy decoding writes it.

    Args:
        model: a language model of transformers.
        tokenizer: its tokenizer; contexts begin with the special tokens that it adds.
        pairs: (context, continuation) each.
        batch_size: pairs that run together.
        on_scored: called after every pair.

    Raises:
        UsageError: the model is none of transformers.
    """
    if not isinstance(model, PreTrainedModel):
        raise UsageError(f"Tasks need a model of transformers, and this is a {type(model).__name__}.")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    logger = logging.getLogger("lm_eval")
    level, padding = logger.level, tokenizer.pad_token
    logger.setLevel(logging.ERROR)  # it warns of models that are passed and not named
    try:
        lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        lm.set_cache_hook(_Hook(on_scored))
        instances = [
            Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=number)
            for number, pair in enumerate(pairs)
        ]
        return lm.loglikelihood(instances, disable_tqdm=True)
    finally:
        logger.setLevel(level)
        tokenizer.pad_token = padding  # lm-eval adds one


class _Hook:
    """In place of lm-eval's cache of answers: told of every answer."""

    def __init__(self, on_scored: Callable[[], None]) -> None:
        self.on_scored = on_scored

    def add_partial(self, attribute: str, request: Any, answer: Any) -> None:
        """Count an answer."""
        self.on_scored()
