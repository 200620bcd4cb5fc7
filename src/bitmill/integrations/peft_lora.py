"""LoRA of PEFT on packed layers, registered when PEFT is imported.

The packed matrix stays as it is: y = W x + s B A x, with A and B trained. PEFT has no registry of layer types, so
its constructor of LoRA layers and its search for all linear layers are extended.

Source: Hu et al. 2021 (arXiv 2106.09685); on quantized layers Dettmers et al. 2023, QLoRA (arXiv 2305.14314).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners import tuners_utils
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.model import LoraModel
from torch import nn

from bitmill.errors import UsageError
from bitmill.runtime.modules.linear import QuantLinear

_RANDOM_STARTS = (True, False, "gaussian", "orthogonal")  # of A and B; the others decompose the weight


class QuantLinearLora(Linear):
    """A packed layer with LoRA adapters; PEFT finds layers with adapters by "Linear" in the name of their type."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)
            super().__init__(base_layer, adapter_name, config, **kwargs)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter.

        Raises:
            UsageError: when the adapter needs the float weight.
        """
        if config.init_lora_weights not in _RANDOM_STARTS:
            raise UsageError(
                f"init_lora_weights is {config.init_lora_weights!r}, which decomposes a float weight, and the "
                "layers are packed; use True or 'gaussian'."
            )
        if config.use_dora:
            raise UsageError("use_dora is True, which scales a float weight, and the layers are packed; use LoRA.")
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: a packed matrix cannot hold a sum."""
        raise UsageError(
            "The layers are packed, and merging would round the adapter away; keep it apart, or merge it into the "
            "decoded model (bitmill export DIR --to dense)."
        )

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device | None, None]:
        """Return the device of the packed tensors; adapters are trained in fp32."""
        buffer = next((base_layer.tied or base_layer).buffers(), None)
        return None if buffer is None else buffer.device, None


def _register() -> None:
    """Extend PEFT; once, as this module is imported once."""
    create, replace = LoraModel._create_new_module, LoraModel._replace_module
    include = tuners_utils._maybe_include_all_linear_layers

    def create_new_module(lora_config: LoraConfig, adapter_name: str, target: Any, **kwargs: Any) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, tuners_utils.BaseTunerLayer) else target
        if not isinstance(base, QuantLinear):
            return create(lora_config, adapter_name, target, **kwargs)
        kwargs.pop("device_map", None)
        return QuantLinearLora(target, adapter_name, lora_config, **kwargs)

    def replace_module(self: LoraModel, parent: nn.Module, name: str, new: nn.Module, old: nn.Module) -> None:
        if isinstance(new, QuantLinearLora):  # PEFT's own looks for a weight
            setattr(parent, name, new)
        else:
            replace(self, parent, name, new, old)

    def include_all_linear(peft_config: Any, model: nn.Module) -> Any:
        wanted = str(getattr(peft_config, "target_modules", "")).lower()
        peft_config = include(peft_config, model)
        if wanted == tuners_utils.INCLUDE_LINEAR_LAYERS_SHORTHAND:
            find_head: Any = getattr(model, "get_output_embeddings", lambda: None)
            head = find_head()
            packed = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
            peft_config.target_modules |= {name for name, module in packed.items() if module is not head}
        return peft_config

    patches = {
        (LoraModel, "_create_new_module"): staticmethod(create_new_module),
        (LoraModel, "_replace_module"): replace_module,
        (tuners_utils, "_maybe_include_all_linear_layers"): include_all_linear,
    }
    for (owner, name), patch in patches.items():
        setattr(owner, name, patch)


_register()
