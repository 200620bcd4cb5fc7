"""Token ids that a model has no embedding for."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def outside_vocabulary(config: Any, tokens: Tensor) -> str | None:
    """Return None if a model can read the tokens, or words about the first one that it cannot.

    Args:
        config: transformers config, or None; without a vocabulary only negative ids are outside.
        tokens: token ids of any shape.
    """
    if not tokens.numel():
        return None
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text_config, "vocab_size", None)
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest >= 0 and (not isinstance(size, int) or highest < size):
        return None
    known = f" below {size}" if isinstance(size, int) else ""
    return f"the token {lowest if lowest < 0 else highest}, but the model's ids are 0 and up{known}"
