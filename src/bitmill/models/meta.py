"""The modules of a source without its weights: parameters on the meta device, buffers in memory."""

from __future__ import annotations

import copy
import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from bitmill.architectures.experts import split_experts
from bitmill.errors import SourceError, one_line
from bitmill.models.kind import ADVICE
from bitmill.sources.base import Source
from bitmill.sources.module import ModuleSource
from bitmill.tasks.base import task_for


def empty_model(source: Source) -> nn.Module:
    """Return the model with parameters on the meta device, buffers in memory, and experts as linear layers.

    Raises:
        SourceError: transformers cannot build the model.
    """
    if isinstance(source, ModuleSource):
        memo: dict[int, Any] = {}
        for parameter in source.model.parameters():
            memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        return split_experts(copy.deepcopy(source.model, memo))
    # the class that loads the folder, whichever one its config names: see `models/kind.py`
    auto_class = task_for(source.config).auto_class
    with _parameters_on_meta():
        try:
            model = auto_class.from_config(
                source.config, dtype=torch.float32, trust_remote_code=source.trust_remote_code
            )
        except Exception as error:  # transformers raises all sorts for numbers out of range
            known = (
                not getattr(source.config, "model_type", None) or type(source.config) in auto_class._model_mapping
            )
            if not known and not isinstance(error, ImportError):  # which code of the model raises
                raise SourceError(
                    f"{source.name} is a model of type {source.config.model_type!r}, which transformers cannot "
                    f"load as {auto_class.__name__}; {ADVICE}."
                ) from None
            raise SourceError(
                f"transformers cannot build the model of {source.name} ({one_line(error)}); check its config."
            ) from None
    return split_experts(model)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move parameters to the meta device as they are registered; buffers (rotary frequencies) stay in memory."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:  # a meta one may be tied: keep its identity
            kind = type(parameter)
            module._parameters[name] = kind(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def trim_malloc() -> None:
    """Return free pages of the C allocator to the operating system; does nothing without glibc.

    glibc keeps freed blocks of up to 32 MB for later requests. Over many blocks they fragment between small live
    objects, and hundreds of MB stay resident without use.
    """
    _malloc_trim()(0)


@functools.cache
def _malloc_trim() -> Callable[[int], object]:
    """Return glibc's malloc_trim, or a function that does nothing."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return lambda pad: None
