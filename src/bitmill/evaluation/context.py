"""The longest context of a model, under the names that configs use for it."""

from __future__ import annotations

from typing import Any

_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "n_ctx",
    "max_sequence_length",
    "max_target_positions",
    "seq_length",
    "context_length",
)


def text_config(config: Any) -> Any:
    """Return the config of the language model in one of images and text; any other config unchanged."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def context_length(config: Any) -> int | None:
    """Return the tokens that a model reads at most; None where its config states no limit.

    Args:
        config: transformers config, that of the language model in one of images and text; or None.
    """
    limits = (getattr(text_config(config), name, None) for name in _NAMES)
    return next((n for n in limits if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)
