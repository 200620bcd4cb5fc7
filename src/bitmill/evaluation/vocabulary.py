"""Token ids of texts, and those that a model has no embedding for."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bitmill.errors import SourceError, one_line
from bitmill.evaluation.context import text_config


def token_ids(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """Return the token ids of a text.

    Args:
        tokenizer: tokenizer of transformers.
        text: the text.
        options: of the tokenizer's call.

    Raises:
        SourceError: The tokenizer fails, as one does whose files are damaged.
    """
    try:
        return list(tokenizer(text, **options)["input_ids"])
    except Exception as error:  # its files decide what it does, and it can raise anything
        raise SourceError(
            f"The tokenizer cannot read a text ({type(error).__name__}: {one_line(error)}); fetch it again."
        ) from None


def outside_vocabulary(config: Any, tokens: Tensor) -> str | None:
    """Return None if a model can read the tokens, or words about the first one that it cannot.

    Args:
        config: transformers config, or None; without a vocabulary only negative ids are outside.
        tokens: token ids of any shape.
    """
    if not tokens.numel() or tokens.is_floating_point():  # pictures
        return None
    size = getattr(text_config(config), "vocab_size", None)
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest >= 0 and (not isinstance(size, int) or highest < size):
        return None
    known = f" below {size}" if isinstance(size, int) else ""
    return f"the token {lowest if lowest < 0 else highest}, but the model's ids are 0 and up{known}"
