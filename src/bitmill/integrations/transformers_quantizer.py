"""The quantizer of transformers for `quant_method: bitmill`, registered by `import bitmill`."""

from __future__ import annotations

from typing import Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitmill.checkpoint.schema import QUANT_METHOD, head_config, layer_formats, shared_paths
from bitmill.errors import CheckpointError
from bitmill.runtime.modules.dequantize import dequantize_model
from bitmill.runtime.modules.linear import QuantLinear
from bitmill.runtime.modules.packed import detach_files
from bitmill.runtime.modules.replace import layers_outside_blocks, replace_layers


class BitmillConfig(QuantizationConfigMixin):
    """`quantization_config` of a bitmill checkpoint: formats with their layers, and the recipe."""

    def __init__(self, groups: list[dict[str, Any]] | None = None, **kwargs: Any) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.groups = groups or []
        self.rest = {k: v for k, v in kwargs.items() if k != "quant_method"}

    def to_dict(self) -> dict[str, Any]:
        """Return the config as in config.json."""
        return {"quant_method": QUANT_METHOD, **self.rest, "groups": self.groups}


class BitmillQuantizer(HfQuantizer):
    """Replaces layers by packed ones on the meta device; from_pretrained then fills the packed buffers."""

    requires_calibration = True
    quantization_config: BitmillConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config.to_dict()
        formats, ends, places = layer_formats(config), head_config(config), shared_paths(config)
        names = {name for name, _ in model.named_modules(remove_duplicate=False)}
        if absent := next((name for name in (*formats, *layers_outside_blocks(ends)) if name not in names), None):
            raise CheckpointError(
                f"The checkpoint quantizes {absent!r}, which {type(model).__name__} does not have; "
                "load it with the model class that config.json names."
            )
        self._replaced = replace_layers(model, formats, ends, places, device="meta")
        self._ties = dict(getattr(model, "all_tied_weights_keys", {}))
        for name in layers_outside_blocks(ends):  # their weights are no longer parameters that could be tied
            model.all_tied_weights_keys.pop(f"{name}.weight", None)
        for layer in (layer for layer in self._replaced.values() if isinstance(layer, QuantLinear)):
            # Some architectures (GPT-2) initialize the weights of their linears by name after loading; a
            # placeholder that counts as initialized prevents an error. It is no parameter, and is removed after
            # loading.
            placeholder = torch.empty(0)
            placeholder._is_hf_initialized = True  # type: ignore[attr-defined]
            object.__setattr__(layer, "weight", placeholder)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        for layer in (layer for layer in self._replaced.values() if isinstance(layer, QuantLinear)):
            del layer.weight
        model.all_tied_weights_keys = self._ties  # for a model that is dequantized later
        self._replaced = {}
        detach_files(model)
        from bitmill.runtime.decode import attach  # transformers is only partly imported when this file is

        attach(model)

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        return dequantize_model(model, dtype or torch.float32)

    def is_serializable(self) -> bool:
        """Return True: save_pretrained writes the packed tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """False: codes have no gradient."""
        return False


def register() -> None:
    """Register the quantizer with transformers, once."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(BitmillConfig)
        register_quantizer(QUANT_METHOD)(BitmillQuantizer)


register()
