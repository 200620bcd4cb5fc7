"""The transformers hook: after `import bitmill`, from_pretrained understands `quant_method: bitmill`."""

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

from bitmill.errors import CheckpointError
from bitmill.formats import FORMATS, Format
from bitmill.quantized import SHARED
from bitmill.runtime.dense import densify
from bitmill.runtime.linear import QuantLinear
from bitmill.runtime.packed import detach_files
from bitmill.runtime.swap import Ends, outside, swap_layers
from bitmill.version import __version__

QUANT_METHOD = "bitmill"
FORMAT_VERSION = 1


class BitmillConfig(QuantizationConfigMixin):
    """`quantization_config` of a bitmill checkpoint: formats with the layers that use them, and the recipe."""

    def __init__(self, groups: list[dict[str, Any]] | None = None, **kwargs: Any) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.groups = groups or []
        self.rest = {k: v for k, v in kwargs.items() if k != "quant_method"}

    def to_dict(self) -> dict[str, Any]:
        """As in config.json."""
        return {"quant_method": QUANT_METHOD, **self.rest, "groups": self.groups}


class BitmillQuantizer(HfQuantizer):
    """Swaps layers for packed ones on the meta device; from_pretrained then fills the packed buffers."""

    requires_calibration = True
    quantization_config: BitmillConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config.to_dict()
        formats, ends, places = layer_formats(config), quantized_ends(config), layer_places(config)
        names = {name for name, _ in model.named_modules(remove_duplicate=False)}
        if absent := next((name for name in (*formats, *outside(ends)) if name not in names), None):
            raise CheckpointError(
                f"The checkpoint quantizes {absent!r}, which {type(model).__name__} does not have; "
                "load it with the model class that config.json names."
            )
        self._swapped = swap_layers(model, formats, ends, places, device="meta")
        self._ties = dict(getattr(model, "all_tied_weights_keys", {}))
        for name in outside(ends):  # their weights are no parameters any more that could be tied
            model.all_tied_weights_keys.pop(f"{name}.weight", None)
        for layer in (layer for layer in self._swapped.values() if isinstance(layer, QuantLinear)):
            # Some architectures (GPT-2) initialise the weights of their linears by name once loading is over;
            # a stand-in that counts as initialised lets them. It is no parameter and is gone after loading.
            stand_in = torch.empty(0)
            stand_in._is_hf_initialized = True  # type: ignore[attr-defined]
            object.__setattr__(layer, "weight", stand_in)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        for layer in (layer for layer in self._swapped.values() if isinstance(layer, QuantLinear)):
            del layer.weight
        model.all_tied_weights_keys = self._ties  # of the plain model that it may become again
        self._swapped = {}
        detach_files(model)
        from bitmill.runtime.decode import attach  # transformers is not all there while this file is imported

        attach(model)

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        return densify(model, dtype or torch.float32)

    def is_serializable(self) -> bool:
        """save_pretrained writes the packed buffers back."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes carry no gradient."""
        return False


def layer_formats(config: dict[str, Any]) -> dict[str, Format]:
    """Layer name -> format, from a `quantization_config`.

    Raises CheckpointError when it is not bitmill's, is damaged, or was written by a later version.
    """
    if config.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"The model is quantized by {config.get('quant_method')!r}, not by bitmill; load it with that tool."
        )
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"The checkpoint has format version {version!r}, and this bitmill ({__version__}) reads "
            f"{FORMAT_VERSION}; update bitmill."
        )
    formats: dict[str, Format] = {}
    try:
        for group in config["groups"]:
            format = FORMATS.from_dict(group["format"])
            formats.update(dict.fromkeys(group["layers"], format))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"The quantization_config is damaged: {error!r} in 'groups'.") from None
    return formats


def quantized_ends(config: dict[str, Any]) -> Ends | None:
    """`ends` of a `quantization_config`, None where embedding and head are in float.

    Raises CheckpointError when it is damaged, or names layers that are not quantized.
    """
    ends = config.get("ends")
    if ends is None:
        return None
    try:
        embedding, head, tied = ends["embedding"], ends["head"], ends["tied"]
        stored = {name for group in config["groups"] for name in group["layers"]}
        sound = isinstance(tied, bool) and embedding in stored and (tied or not head or head in stored)
        if not (sound and isinstance(head, str) and (head or not tied)):
            raise ValueError(ends)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"The quantization_config is damaged: {error!r} in 'ends'.") from None
    return dict(ends)


def layer_places(config: dict[str, Any]) -> dict[str, str]:
    """Layer name -> path of the module that holds what it shares, for those that share something.

    Raises CheckpointError for a path that leads elsewhere.
    """
    places: dict[str, str] = {}
    for group in config["groups"]:
        place = group.get("shared")
        if place is None:
            continue
        sharing = FORMATS.from_dict(group["format"]).shared
        if not sharing or not isinstance(place, str) or not place.startswith(f"{SHARED}."):
            raise CheckpointError(
                f"The quantization_config is damaged: its layers cannot share what is in {place!r}."
            )
        places.update(dict.fromkeys(group["layers"], place))
    return places


def register() -> None:
    """Make transformers know bitmill; harmless when called again."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(BitmillConfig)
        register_quantizer(QUANT_METHOD)(BitmillQuantizer)


register()
