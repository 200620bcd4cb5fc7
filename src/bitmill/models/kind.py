"""Checks that a model is of the kind that its task expects, and that its folder loads as such."""

from __future__ import annotations

from torch import nn

from bitmill.errors import SourceError
from bitmill.sources.base import Source
from bitmill.tasks.base import Task

ADVICE = (
    "bitmill quantizes decoders with the head of a language model, encoders without one (BERT, ViT and DINOv2), "
    "encoder-decoders and classifiers"
)


def check_kind(model: nn.Module, blocks: nn.ModuleList, source: Source, task: Task) -> None:
    """Raise SourceError for a model that is not what `from_pretrained` loads for its task.

    Args:
        model: the model that the task's class builds, or a live one; parameters may be on the meta device.
        blocks: its blocks.
        source: where it comes from.
        task: its task.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return
    if source.as_saved:
        _check_named_class(model, source, task)
    if task.generates:
        _check_generates(model, blocks, source)


def check_class_loads(model: nn.Module, source: Source, task: Task) -> None:
    """Raise SourceError for a live model whose folder `from_pretrained` would open as another class.

    Args:
        model: the live model.
        source: its source.
        task: its task.
    """
    kind = type(model)
    if kind.__module__.startswith("transformers.") and kind.__name__ not in _known_classes(task):
        raise SourceError(
            f"{source.name} is a {kind.__name__}, and no folder of it could be loaded as {task.auto_class_name}; "
            "leave out=... away to quantize it in place."
        )


def _check_named_class(model: nn.Module, source: Source, task: Task) -> None:
    """Raise SourceError where the config names a class of transformers with another head."""
    import transformers

    listed = source.config.architectures
    names = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    named = [name for name in names if hasattr(transformers, name)]
    if not type(model).__module__.startswith("transformers.") or not named:
        return  # names of code that comes with the model, or of another library
    base = getattr(model, getattr(model, "base_model_prefix", ""), model)
    if not {type(model).__name__, type(base).__name__, *_known_classes(task)}.intersection(named):
        raise SourceError(
            f"{source.name} is a {named[0]}, but would be loaded as a {type(model).__name__}, without its own "
            f"head; {ADVICE}."
        )


def _known_classes(task: Task) -> set[str]:
    """Return the names of the classes of transformers that the task's auto class loads."""
    mapping = task.auto_class._model_mapping._model_mapping
    return {name for names in mapping.values() for name in ((names,) if isinstance(names, str) else names)}


def _check_generates(model: nn.Module, blocks: nn.ModuleList, source: Source) -> None:
    """Raise SourceError for a model that does not predict the next token of a text."""
    kind = type(model)
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        reason = "which has an encoder and a decoder"
    elif kind.__module__.startswith("transformers.") and not kind.can_generate():  # type: ignore[attr-defined]
        reason = "which does not write text"
    else:
        causal = [module.is_causal for module in blocks[0].modules() if hasattr(module, "is_causal")]
        if not causal or any(causal) or getattr(config, "is_decoder", None) is not False:
            return  # `try_block_kinds` finds others
        reason = "whose attention reads the tokens to come too"
    raise SourceError(f"{source.name} is a {kind.__name__}, {reason}; {ADVICE}.")
