"""Guard of a compiled model: detects changes of the model, and requests for more than its logits.

It runs before every token: dictionaries and addresses are collected once and then compared in C.
"""

from __future__ import annotations

from itertools import chain, repeat
from operator import contains, itemgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel


class ModelGuard:
    """The modules and parameters of a model, by identity and address, and its dictionaries of hooks."""

    def __init__(self, model: Any) -> None:
        self.model = model
        modules = list(model.modules())
        self._children = [m._modules for m in modules if m._modules]
        self._modules = list(chain.from_iterable(map(dict.values, self._children)))
        self._all, self._types = modules, list(map(type, modules))
        self._owners = [m._parameters for m in modules if m._parameters]
        parameters = list(chain.from_iterable(map(dict.values, self._owners)))
        self._ids = list(map(id, parameters))
        self._parameters = [p for p in parameters if p is not None]  # kept alive, so that no id is reused
        self._addresses = _addresses(self._parameters)
        inner = modules[1:]  # hooks of the model itself are called around its forward
        self._hooks: list[Any] = [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
        self._hooks += [hooks for m in inner for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._vars = [vars(m) for m in inner]
        self._modes = [vars(m) for m in modules if len(m._modules) > 1 or isinstance(m, nn.Dropout)]
        self._models = [m for m in modules if isinstance(m, PreTrainedModel)]  # with a config each, or one of all
        self._depth = model.config.num_hidden_layers

    def is_current(self) -> bool:
        """Return True if all modules and parameters are unchanged, in identity and address."""
        return (
            list(chain.from_iterable(map(dict.values, self._children))) == self._modules
            and list(map(id, chain.from_iterable(map(dict.values, self._owners)))) == self._ids
            and list(map(type, self._all)) == self._types
            and _addresses(self._parameters) == self._addresses
        )

    def blocking_reason(self) -> str | None:
        """Return a phrase if only the model's own forward serves now (hooks, dropout, hidden states), or None."""
        hooks = [hook for registered in filter(None, self._hooks) for hook in registered.values()]
        if not all(map(_is_idle, hooks)) or any(map(contains, self._vars, repeat("forward"))):
            return "hooks or patches are attached to its modules"
        if any(map(itemgetter("training"), self._modes)):
            return "it is in training mode"
        for one in {id(m.config): m.config for m in self._models}.values():
            if one.output_hidden_states or one.output_attentions or not one.return_dict:
                return "its config requests more than logits"
            if one.num_hidden_layers != self._depth:
                return "its config names another number of blocks"
        return None


def _is_idle(hook: Any) -> bool:
    """Return True for hooks that transformers leaves after hidden states were requested; they do nothing."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


def _addresses(tensors: list[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))
