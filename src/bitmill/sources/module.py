"""A live nn.Module as a source of weights."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bitmill.architectures.model_class import task_of_class
from bitmill.errors import SourceError
from bitmill.sources.base import StoredType, config_bytes, save_auxiliary
from bitmill.sources.hub import HubOrigin
from bitmill.sources.pooling import MEAN

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


class ModuleSource:
    """The state dict of a live module; tied tensors are listed once.

    Args:
        model: the module, with weights in memory.
        tokenizer: its tokenizer, needed where text is read.
        name: name for messages; that of the config or the class without it.

    Raises:
        SourceError: A tensor is on the meta device.
    """

    trust_remote_code = False
    as_saved = False
    states_dtype = True
    origin: HubOrigin | None = None

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        name: str | None = None,
    ) -> None:
        from transformers import PretrainedConfig

        config = getattr(model, "config", None)
        self.model = model
        self.config: PretrainedConfig = (
            _with_class(config, model) if isinstance(config, PretrainedConfig) else PretrainedConfig()
        )
        self.name = name or getattr(config, "name_or_path", None) or type(model).__name__
        self._tokenizer = tokenizer
        self._tensors = _untied(model)
        self._fingerprint: str | None = None
        for key, tensor in self._tensors.items():
            if tensor.is_meta:
                raise SourceError(f"The tensor {key!r} has no data (device 'meta'); load the weights first.")

    def names(self) -> list[str]:
        """Return the state-dict names, tied tensors under their first name."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor."""
        return tuple(self._get(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of one tensor."""
        return self._get(name).dtype

    def tensor(self, name: str) -> torch.Tensor:
        """Return a copy of one tensor on the CPU; the live model is not changed."""
        return self._get(name).detach().to("cpu", copy=True).contiguous()

    def stored_types(self) -> list[StoredType]:
        """Return []: all weights are floats."""
        return []

    def fingerprint(self) -> str:
        """Return the sha256 (hex) over the config and the name, dtype, shape and bytes of every tensor."""
        if self._fingerprint is None:
            digest = hashlib.sha256(config_bytes(self.config))
            for name in self.names():
                tensor = self.tensor(name)
                digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def write_auxiliary_files(self, folder: Path) -> None:
        """Save the tokenizer, where there is one, and the generation config."""
        if self._tokenizer is not None:
            save_auxiliary("tokenizer", self._tokenizer.save_pretrained, folder)
        generation = getattr(self.model, "generation_config", None)
        if generation is not None:
            save_auxiliary("generation config", generation.save_pretrained, folder)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer. Raises SourceError where none was passed."""
        if self._tokenizer is None:
            raise SourceError(
                f"The live model {self.name!r} has no tokenizer; pass tokenizer=..., or token windows as "
                "calibration and measure=0."
            )
        return self._tokenizer

    def processor(self, class_name: str) -> Any:
        """Return the processor that was passed as tokenizer. Raises SourceError where none was."""
        if self._tokenizer is None:
            raise SourceError(
                f"The live model {self.name!r} has no {class_name.removeprefix('Auto')}; pass it as "
                "tokenizer=..., or a tensor of windows as calibration and measure=0."
            )
        return self._tokenizer

    def pooling(self) -> str:
        """Return the mean over tokens, which a module does not specify otherwise."""
        return MEAN

    def _get(self, name: str) -> torch.Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise SourceError(f"The model {self.name!r} has no tensor {name!r}.") from None


def _with_class(config: PretrainedConfig, model: torch.nn.Module) -> PretrainedConfig:
    """Return the config of a model, with its class where it names none and the class decides on the task."""
    name = type(model).__name__
    if config.architectures or task_of_class([name], bool(config.is_encoder_decoder)) in (None, "causal_lm"):
        return config
    named = copy.copy(config)
    named.architectures = [name]
    return named


def _untied(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the state dict without further names of tied parameters."""
    listed: set[tuple[int, tuple[int, ...], tuple[int, ...]]] = set()
    untied = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))
        if not tensor.is_meta and tensor.numel() and key in listed:
            continue
        listed.add(key)
        untied[name] = tensor
    return untied
