"""A live nn.Module as a source."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bitmill.errors import SourceError
from bitmill.sources.base import config_bytes
from bitmill.sources.pooling import MEAN

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


class ModuleSource:
    """The state dict of a module the caller holds; tensors tied to another one are listed once.

    The tokenizer, when one is needed, is the caller's to give.
    """

    trust_remote_code = False

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
        self.config: PretrainedConfig = config if isinstance(config, PretrainedConfig) else PretrainedConfig()
        self.name = name or getattr(config, "name_or_path", None) or type(model).__name__
        self._tokenizer = tokenizer
        self._tensors = _untied(model)
        self._fingerprint: str | None = None
        for key, tensor in self._tensors.items():
            if tensor.is_meta:
                raise SourceError(f"The tensor {key!r} has no data (device 'meta'); load the weights first.")

    def names(self) -> list[str]:
        """State-dict names, ties listed under their first name."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor."""
        return tuple(self._get(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of one tensor."""
        return self._get(name).dtype

    def tensor(self, name: str) -> torch.Tensor:
        """A copy of one tensor on the CPU, so that the live model stays as it is."""
        return self._get(name).detach().to("cpu", copy=True).contiguous()

    def fingerprint(self) -> str:
        """sha256 (hex) over the config and, per tensor, its name, dtype, shape and bytes."""
        if self._fingerprint is None:
            digest = hashlib.sha256(config_bytes(self.config))
            for name in self.names():
                tensor = self.tensor(name)
                digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def write_auxiliary_files(self, folder: Path) -> None:
        """Save the tokenizer, if the caller gave one, and the model's generation config."""
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(str(folder))
        generation = getattr(self.model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(str(folder))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The caller's tokenizer, or a SourceError."""
        if self._tokenizer is None:
            raise SourceError(
                f"The live model {self.name!r} carries no tokenizer; pass one beside it, or token windows as "
                "calibration and measure=0."
            )
        return self._tokenizer

    def pooling(self) -> str:
        """The mean over tokens: a module says nothing about it."""
        return MEAN

    def _get(self, name: str) -> torch.Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise SourceError(f"The model {self.name!r} has no tensor {name!r}.") from None


def _untied(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict without the second and later names of one and the same parameter."""
    seen: set[tuple[int, tuple[int, ...], tuple[int, ...]]] = set()
    kept = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))
        if not tensor.is_meta and tensor.numel() and key in seen:
            continue
        seen.add(key)
        kept[name] = tensor
    return kept
