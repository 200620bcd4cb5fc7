"""The task of a model by the class that its config names, as transformers' tables of classes group them."""

from __future__ import annotations

from functools import cache
from typing import Any

# Task of `bitmill.tasks` -> transformers' table of the classes that have it; of several, the first counts.
_TABLES = {
    "causal_lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq_lm": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "speech_seq2seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "sequence_classifier": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token_classifier": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
}
_ENCODER_DECODERS = ("seq2seq_lm", "speech_seq2seq")


def task_of_class(classes: Any, encoder_decoder: bool) -> str | None:
    """Return the task of the first class that transformers knows; None where none of them has one of these tasks.

    Args:
        classes: `architectures` of a config; None where it names none.
        encoder_decoder: the config describes an encoder and a decoder. Some classes are listed as such and are
            decoders that read sounds.
    """
    for name in classes if isinstance(classes, list) else ():
        task = _tasks().get(name) if isinstance(name, str) else None
        if task is not None:
            return task if encoder_decoder or task not in _ENCODER_DECODERS else None
    return None


@cache
def _tasks() -> dict[str, str]:
    """Return name of a class -> task."""
    from transformers.models.auto import modeling_auto

    tasks: dict[str, str] = {}
    for task, table in _TABLES.items():
        for names in getattr(modeling_auto, table, {}).values():
            for name in (names,) if isinstance(names, str) else names:
                tasks.setdefault(name, task)
    masked = getattr(modeling_auto, "MODEL_FOR_MASKED_LM_MAPPING_NAMES", {})
    for kind, names in getattr(modeling_auto, "MODEL_MAPPING_NAMES", {}).items():
        if kind in masked:  # a model without a head, of a type that is trained to fill in masked tokens
            for name in (names,) if isinstance(names, str) else names:
                tasks.setdefault(name, "text_encoder")
    return tasks
