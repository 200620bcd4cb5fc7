"""The `quantization_config` of a folder, as vLLM asks it how each layer is stored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper

from bitmill.checkpoint.schema import QUANT_METHOD, head_config, layer_formats, shared_paths
from bitmill.errors import CheckpointError
from bitmill.formats import Format
from bitmill.integrations.vllm.embedding import PackedEmbeddingMethod
from bitmill.integrations.vllm.linear import PackedLinearMethod

# Oldest GPU: what Triton's kernels run on.
_CAPABILITY = 70


class BitmillConfig(QuantizationConfig):
    """Formats by layer, in the names of vLLM's model.

    Attributes:
        formats: layer -> format.
        embedding: format of the table of embeddings; None where it is in float.
        tied: the head has no tensors of its own, and multiplies with that table.
    """

    def __init__(self, formats: dict[str, Format], embedding: Format | None, tied: bool) -> None:
        super().__init__()
        self.formats, self.embedding, self.tied = formats, embedding, tied

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BitmillConfig:
        """Read the config of a folder.

        Raises:
            CheckpointError: it is damaged, or of a recipe that vLLM's layers cannot run.
        """
        formats = layer_formats(config)
        ends = head_config(config)
        if shared := next(iter(shared_paths(config)), None):
            raise CheckpointError(
                f"The layer {shared!r} shares its codebooks with other layers, which is not served by vLLM; use "
                "`bitmill serve`, or quantize with a format whose layers keep their own."
            )
        if config.get("recipe", {}).get("attention"):
            raise CheckpointError(
                "The recipe rounds queries, keys and values inside attention, which vLLM's attention does not; "
                "use `bitmill serve`, or a recipe without attention."
            )
        embedding = formats.get(ends["embedding"]) if ends else None
        return cls(formats, embedding, ends["tied"] if ends else False)

    def get_name(self) -> str:
        """Return the name of the format."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the types of inputs that kernels take."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the oldest GPU."""
        return _CAPABILITY

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no further files: config.json has the config."""
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Rename layers as vLLM's model names them; parts of fused layers keep their names."""
        mapper = replace(hf_to_vllm_mapper, orig_to_new_stacked={})
        renamed = {mapper.map_name(name): format for name, format in self.formats.items()}
        self.formats = {name: format for name, format in renamed.items() if name}

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return how vLLM loads and runs a layer; None for layers that are never quantized.

        Raises:
            CheckpointError: the layer holds quantized experts.
        """
        formats = self.part_formats(prefix)
        quantized = any(formats)
        if isinstance(layer, LinearBase):
            return PackedLinearMethod(formats) if quantized else UnquantizedLinearMethod()
        if isinstance(layer, VocabParallelEmbedding):
            unnamed = not isinstance(layer, ParallelLMHead) and not prefix  # some models of vLLM do not name it
            format = self.embedding if unnamed or (self.tied and not quantized) else formats[0]
            return PackedEmbeddingMethod(format) if format else None
        if isinstance(layer, RoutedExperts) and any(name.startswith(f"{prefix}.") for name in self.formats):
            raise CheckpointError(
                f"{prefix!r} holds quantized experts, which vLLM does not run; use `bitmill serve`."
            )
        return None

    def part_formats(self, prefix: str) -> list[Format | None]:
        """Return the formats of the stored matrices that vLLM fuses into one layer; None for those in float.

        Args:
            prefix: name of vLLM's layer.
        """
        if prefix in self.formats:
            return [self.formats[prefix]]
        above, _, leaf = prefix.rpartition(".")
        stored = self.packed_modules_mapping.get(leaf, [leaf])
        return [self.formats.get(f"{above}.{name}" if above else name) for name in stored]
