"""The quantizer of transformers for `quant_method: bitmill`, registered by `import bitmill`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitmill.architectures.experts import split_experts
from bitmill.checkpoint.marker import WEIGHT, marker_names, weight_marker
from bitmill.checkpoint.reader import Checkpoint, open_checkpoint
from bitmill.checkpoint.schema import QUANT_METHOD, head_config, layer_formats, shared_paths
from bitmill.errors import CheckpointError
from bitmill.integrations.renaming import model_names, renamed_config
from bitmill.integrations.saving import protect_saves
from bitmill.recipes.attention import attach_attention
from bitmill.runtime.modules.dequantize import dequantize_model
from bitmill.runtime.modules.embedding import QuantEmbedding
from bitmill.runtime.modules.packed import PackedMatrix, check_packed, detach_files
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

    def get(self, key: str, default: Any = None) -> Any:
        """Return a field as from the dict in config.json: transformers also reads a live model's config so."""
        return self.to_dict().get(key, default)


class BitmillQuantizer(HfQuantizer):
    """Replaces layers by packed ones on the meta device; from_pretrained then fills the packed buffers.

    Before the tensors are read the folder is opened and checked as `bitmill.load` does; afterwards every tensor of
    the model must come from it. transformers by itself only warns of missing tensors, and accepts other shapes.
    """

    requires_calibration = True
    quantization_config: BitmillConfig

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        stored = self.quantization_config.to_dict()
        layer_formats(stored), head_config(stored)  # sound
        split_experts(model)
        renamed = model_names(model, stored)
        self.quantization_config = BitmillConfig(**renamed_config(stored, renamed))
        model.config.quantization_config = self.quantization_config
        config = self.quantization_config.to_dict()
        formats, ends, places = layer_formats(config), head_config(config), shared_paths(config)
        names = {name for name, _ in model.named_modules(remove_duplicate=False)}
        if absent := next((name for name in (*formats, *layers_outside_blocks(ends)) if name not in names), None):
            raise CheckpointError(
                f"The checkpoint quantizes {absent!r}, which {type(model).__name__} does not have; "
                "load it with the model class that config.json names."
            )
        self._replaced = replace_layers(model, formats, ends, places, device="meta")
        for table in (layer for layer in self._replaced.values() if isinstance(layer, QuantEmbedding)):
            # in memory like other buffers: torch makes copies of a meta tensor by code that imports sympy
            table.weight = torch.empty(table.weight.shape, dtype=table.weight.dtype, device="cpu")
        files = [Path(file) for file in checkpoint_files or ()]
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self._renames = False
        if files:
            checkpoint = self._check_folder(files, layer_formats(stored), renamed)
            self._renames = not checkpoint.entries.keys() <= {*self._shapes, *marker_names(formats)}
        self._unexpected = model._keys_to_ignore_on_load_unexpected
        # one pattern for all blocks, because patterns take time to compile
        markers = {re.sub(r"\d+", r"\\d+", rf"^{re.escape(name)}$") for name in marker_names(formats)}
        model._keys_to_ignore_on_load_unexpected = {*(self._unexpected or ()), *markers}
        self._ties = dict(getattr(model, "all_tied_weights_keys", {}))
        for name in layers_outside_blocks(ends):  # their weights are no longer parameters that could be tied
            model.all_tied_weights_keys.pop(f"{name}.weight", None)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Return the conversions of names for folders of another release; those of this one keep their names."""
        return weight_conversions if self._renames else []

    def _check_folder(self, files: list[Path], formats: dict[str, Any], renamed: dict[str, str]) -> Checkpoint:
        """Open the folder and check that it is sound, and that it holds the quantized layers of the model.

        Args:
            files: the files that transformers will read.
            formats: the formats of layers by their names in the folder.
            renamed: name of a layer in the folder -> in the model.
        """
        folder = files[0].parent
        shapes = {name: self._replaced[renamed[name]].shape for name in formats}
        checkpoint = open_checkpoint(folder, shapes, digests="all")
        if others := {path.name for path in files} ^ {path.name for path in checkpoint.files.values()}:
            raise CheckpointError(
                f"{folder} would be loaded with other files than its index names, such as {min(others)}; "
                "leave out options of from_pretrained that choose files."
            )
        if checkpoint.formats != formats:
            raise CheckpointError(f"The config is not that of {folder}; leave config=... out of from_pretrained.")
        for name in checkpoint.formats:
            if checkpoint.shape(name) != shapes[name]:
                raise CheckpointError(
                    f"The layer {name!r} of {folder} has the shape {checkpoint.shape(name)}, and its config makes "
                    f"it {shapes[name]}; the folder is damaged, quantize again."
                )
        return checkpoint

    def _check_loaded(self, model: Any) -> None:
        """Raise CheckpointError for a tensor of the model that was not loaded, or has another shape or type.

        transformers marks a tensor that it has loaded, and initializes the others at random.
        """
        absent = "|".join(f"({pattern})" for pattern in model._keys_to_ignore_on_load_missing or ())
        ignored = re.compile(absent or r"(?!)")
        layouts = {
            f"{name}.{part}": dtype
            for name, layer in self._replaced.items()
            for part, (_, dtype) in layer.format.layout(layer.shape).items()
        }
        folder = model.name_or_path or "The checkpoint"
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name in model.all_tied_weights_keys or ignored.search(name) or tensor.is_meta:  # meta: on the disk
                continue
            if not getattr(tensor, "_is_hf_initialized", False):
                raise CheckpointError(f"{folder} lacks the tensor {name!r} of its model; quantize it again.")
            if tensor.shape != self._shapes[name] or tensor.dtype != layouts.get(name, tensor.dtype):
                raise CheckpointError(
                    f"The tensor {name!r} of {folder} is {tensor.dtype} {tuple(tensor.shape)} and must be "
                    f"{layouts.get(name, tensor.dtype)} {tuple(self._shapes[name])}; quantize it again."
                )

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self._check_loaded(model)
        check_packed(model, model.name_or_path or "the checkpoint")
        model._keys_to_ignore_on_load_unexpected = self._unexpected
        model.all_tied_weights_keys = self._ties  # for a model that is dequantized later
        self._replaced, self._shapes = {}, {}
        model._weight_conversions = []  # save_pretrained writes the names of the model
        detach_files(model)
        protect_saves(model)
        attach_attention(model, self.quantization_config.get("recipe"))
        from bitmill.runtime.decode import attach  # transformers is only partly imported when this file is

        attach(model)

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        return dequantize_model(model, dtype or torch.float32)

    def is_serializable(self) -> bool:
        """Return True: save_pretrained writes the packed tensors."""
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the tensors that save_pretrained writes: those of the model, and the empty weights of its layers.

        Raises:
            CheckpointError: the packed layers of the model are not those of its config.
        """
        if getattr(model, "_hf_peft_config_loaded", False):  # transformers keeps the adapters of it alone
            return model.state_dict(), {}
        packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedMatrix)}
        own = {name: layer for name, layer in packed.items() if getattr(layer, "tied", None) is None}
        described = getattr(model.config, "quantization_config", None)
        listed = layer_formats(described.to_dict()) if isinstance(described, BitmillConfig) else {}
        if listed != {name: layer.format for name, layer in own.items()}:
            raise CheckpointError(
                "The packed layers of the model are not those of its quantization_config, so that a saved copy "
                "could not be loaded; save it as it was quantized, or unpack it (bitmill.load with dense=True)."
            )
        markers = {f"{name}.{WEIGHT}": weight_marker(layer.shape) for name, layer in own.items()}
        return {**model.state_dict(), **markers}, {}

    @property
    def is_trainable(self) -> bool:
        """True for adapters on packed layers; codes have no gradient, and transformers refuses to train them."""
        return True


def mark_quantized(model: nn.Module, config: dict[str, Any]) -> None:
    """Make a model that was quantized in place one that save_pretrained writes with its `quantization_config`.

    Args:
        model: the model with packed layers; only those of transformers have a config and can be saved.
        config: as in config.json, see `checkpoint.schema.quantization_config`.
    """
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        described = BitmillConfig(**config)
        model.config.quantization_config, model.config._is_quantized = described, True
        marks = {
            "hf_quantizer": BitmillQuantizer(described),
            "quantization_method": QUANT_METHOD,
            "_weight_conversions": [],  # save_pretrained writes the names of the model
        }
        vars(model).update(marks, is_quantized=True)
        protect_saves(model)


def register() -> None:
    """Register the quantizer with transformers, once."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(BitmillConfig)
        register_quantizer(QUANT_METHOD)(BitmillQuantizer)


register()
