"""Models without weights: names, shapes and dtypes of the tensors, from a config alone."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from bitmill.config.paths import user_path
from bitmill.errors import SourceError
from bitmill.sources import zoo
from bitmill.sources.base import Source, StoredType
from bitmill.sources.config_bounds import read_config
from bitmill.sources.hf import load_config
from bitmill.sources.hub import HubOrigin, hub_files, is_hub_id
from bitmill.sources.open import open_source
from bitmill.sources.pooling import MEAN

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class ConfigOnlySource:
    """A source without weights. Tensors have the dtype of the config, float16 where it names none."""

    as_saved = False
    states_dtype = True
    origin: HubOrigin | None = None

    def __init__(self, config: PretrainedConfig, name: str, *, trust_remote_code: bool = False) -> None:
        self.config, self.name, self.trust_remote_code = config, name, trust_remote_code
        self._dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float16

    @cached_property
    def _tensors(self) -> dict[str, nn.Parameter]:
        """Every parameter by name; tied parameters under their first name."""
        from bitmill.models.meta import empty_model

        model = empty_model(self)
        if hasattr(model, "tie_weights"):
            model.tie_weights()  # type: ignore[operator]
        return dict(model.named_parameters())

    def names(self) -> list[str]:
        """Return the names of the parameters."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one parameter. Raises SourceError for an unknown name."""
        if name not in self._tensors:
            raise SourceError(f"The model {self.name!r} has no tensor {name!r}.")
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of every parameter."""
        return self._dtype

    def tensor(self, name: str) -> torch.Tensor:
        """Raise SourceError, because there are no weights."""
        self._refuse()

    def stored_types(self) -> list[StoredType]:
        """Return []: all weights are floats."""
        return []

    def fingerprint(self) -> str:
        """Raise SourceError, because there are no weights."""
        self._refuse()

    def write_auxiliary_files(self, folder: Path) -> None:
        """Write nothing."""

    def tokenizer(self) -> Any:
        """Raise SourceError, because there is no tokenizer."""
        self._refuse()

    def processor(self, class_name: str) -> Any:
        """Raise SourceError: a config alone reads no pictures and no sound."""
        raise SourceError(f"{self.name} is a config without a processor; give the model.")

    def pooling(self) -> str:
        """Return the mean over tokens, which a config does not specify otherwise."""
        return MEAN

    def _refuse(self) -> NoReturn:
        raise SourceError(f"{self.name} has a config but no weights; give a model with weights.")


def open_config_only(model: str | Path, *, trust_remote_code: bool = False) -> Source:
    """Open a model for its names, shapes and dtypes, without weights where possible.

    Args:
        model: a name of `bundled_configs()`, a folder with a config.json (weights may be absent, pickled, or
            quantized by bitmill), a hub id, of which only the config is fetched, a .gguf file, or a demo model.
        trust_remote_code: allow Python code that comes with the model.

    Raises:
        SourceError: There is no such model, or it is damaged.
    """
    if isinstance(model, str) and model in zoo.bundled_configs():
        from transformers import AutoConfig

        return ConfigOnlySource(AutoConfig.for_model(**zoo.bundled_config(model)), model)
    path = user_path(model)
    if path.is_dir() and _lacks_float_weights(path):
        return _from_folder(path, path.resolve().name, trust_remote_code)
    local = path.exists() or isinstance(model, Path) or model in zoo.ZOO
    if not local and is_hub_id(str(model)):
        patterns = ["config.json"] + ["*.py"] * trust_remote_code
        return _from_folder(hub_files(str(model), patterns)[0], str(model), trust_remote_code)
    return open_source(model, trust_remote_code=trust_remote_code)


def _lacks_float_weights(folder: Path) -> bool:
    """Return True if a folder has no weights that a source could open, or was written by bitmill."""
    try:
        config = read_config(folder / "config.json")
    except SourceError:
        return False
    quantized = config.get("quantization_config")
    own = isinstance(quantized, dict) and quantized.get("quant_method") == "bitmill"
    return own or not (quantized or any(folder.glob("*.safetensors")))


def _from_folder(folder: Path, name: str, trust_remote_code: bool) -> ConfigOnlySource:
    """Return the source of the config.json in a folder."""
    config = load_config(folder, trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the config is that of the float model
    return ConfigOnlySource(config, name, trust_remote_code=trust_remote_code)
