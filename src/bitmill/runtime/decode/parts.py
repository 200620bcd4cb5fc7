"""Models that the compiled step supports, identified by their exact classes and modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import activations
from transformers.pytorch_utils import Conv1D

from bitmill.formats.quantized import SHARED
from bitmill.runtime.decode.families import FAMILIES, Family
from bitmill.runtime.modules.embedding import QuantEmbedding, quantized_class
from bitmill.runtime.modules.linear import QuantLinear

_ATTENTION = ("eager", "sdpa", "bitmill", None)  # bitmill: sdpa, but for packed caches
_PLAIN = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.Dropout, nn.ModuleList, Conv1D, QuantLinear)
_ACTIVATION_MODULES = ("torch.nn.modules.activation", "transformers.activations")
# csrc/step/decoder.h: Activation
ACTIVATIONS: dict[type, int] = {
    nn.SiLU: 0,
    activations.SiLUActivation: 0,
    activations.GELUTanh: 1,
    activations.NewGELUActivation: 1,
    activations.FastGELUActivation: 1,
    activations.GELUActivation: 2,
    nn.ReLU: 3,
}


class NotEligibleError(Exception):
    """A model cannot use the compiled step; the message is a phrase with the reason."""


@dataclass(frozen=True)
class Parts:
    """A supported model, taken apart.

    windows: Tokens that each block reads, the present one included; 0 for all.
    """

    family: Family
    base: Any
    head: Any
    layers: list[Any]
    windows: tuple[int, ...]


def model_parts(model: Any) -> Parts:
    """Return the parts of a model of transformers.

    Raises:
        NotEligibleError: for any other class among its modules, and for features that the step lacks.
    """
    path, name = _class(model)
    family = next((f for f in FAMILIES if (path, name) in f.classes and name == f.prefix + f.causal), None)
    if family is None:
        raise _foreign_class(model)
    base, head = model.get_submodule(family.base), model.get_submodule(family.head)
    layers = list(base.get_submodule(family.layers))
    _check_modules(model, family, (family.base, family.head))
    _check_modules(base, family, (*family.base_modules, family.layers, *family.ignored))
    for layer in layers:
        _check_modules(layer, family, (*family.block_modules, *family.ignored))
    if not layers:
        raise NotEligibleError("it has no blocks")
    return Parts(family, base, head, layers, _checked_windows(family, model.config, len(layers)))


def _check_modules(holder: nn.Module, family: Family, paths: tuple[str, ...]) -> None:
    """Raise NotEligibleError unless the modules are those at the paths and on the way to them, of known classes.

    Modules inside the layer at a path are checked with that layer.
    """
    for name, module in holder.named_modules():
        if name in paths or not name or any(path.startswith(f"{name}.") for path in paths):
            if not _is_known(module, family):
                raise _foreign_class(module)
        elif f"{name}.".split(".")[0] != SHARED and not any(name.startswith(f"{path}.") for path in paths):
            raise NotEligibleError(f"its modules are not those of a {family.prefix}{family.causal}: {name}")


def _is_known(module: Any, family: Family) -> bool:
    kind = type(module)
    if issubclass(kind, QuantEmbedding):
        kind = module.float_class
        if type(module) is not quantized_class(kind):
            return False
    is_plain = kind in _PLAIN or kind.__module__ in _ACTIVATION_MODULES
    return is_plain or (kind.__module__, kind.__qualname__) in family.classes


def _checked_windows(family: Family, config: Any, layers: int) -> tuple[int, ...]:
    """Return the window of each block, 0 for none. Raises NotEligibleError for configs that the step lacks."""
    if layers != config.num_hidden_layers:
        raise NotEligibleError("its config names another number of blocks")
    if config._attn_implementation not in _ATTENTION:
        raise NotEligibleError(f"its attention is {config._attn_implementation!r}, not eager or sdpa")
    for name, value in family.required:
        if (getattr(config, name, None) or None) != (value or None):
            raise NotEligibleError(f"its config has {name} = {getattr(config, name)!r}")
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if types is None:
        types = ["sliding_attention" if window else "full_attention"] * layers
    if len(types) != layers or not set(types) <= {"full_attention", "sliding_attention"}:
        raise NotEligibleError(f"its layers are of the types {sorted(set(types))}")
    if "sliding_attention" not in types:
        return (0,) * layers
    if not family.windows or not isinstance(window, int) or window < 2:
        raise NotEligibleError(f"its config has a sliding window of {window!r}")
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)


def _class(module: Any) -> tuple[str, str]:
    return type(module).__module__, type(module).__qualname__


def _foreign_class(module: Any) -> NotEligibleError:
    path, name = _class(module)
    return NotEligibleError(f"{name} of {path} is no class that the compiled step was written for")
