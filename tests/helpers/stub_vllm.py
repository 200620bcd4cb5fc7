"""The classes of vLLM that the plugin derives from, where vLLM is not installed: layers divided among ranks."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

_LAYERS = "vllm.model_executor.layers"


class LinearBase(nn.Module):
    """A linear layer of some fused matrices on one of several ranks."""

    def __init__(
        self, config: Any, name: str, sizes: list[int], inputs: int, rank: int = 0, ranks: int = 1
    ) -> None:
        super().__init__()
        self.prefix, self.tp_rank, self.tp_size = name, rank, ranks
        self.quant_method = config.get_quant_method(self, name)
        self.quant_method.create_weights(self, inputs, sizes, inputs, sum(sizes), None)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return self.quant_method.apply(self, x)


class VocabParallelEmbedding(nn.Module):
    """A table of embeddings, padded, on one of several ranks."""

    def __init__(self, config: Any, name: str, words: int, width: int, rank: int = 0, ranks: int = 1) -> None:
        super().__init__()
        each = -(-words // ranks // 8) * 8
        self.prefix, self.embedding_dim, self.num_embeddings_per_partition = name, width, each
        first, last = min(rank * each, words), min((rank + 1) * each, words)
        self.shard_indices = SimpleNamespace(org_vocab_start_index=first, org_vocab_end_index=last)
        self.params_dtype = torch.float32
        self.quant_method = config.get_quant_method(self, name)
        self.quant_method.create_weights(self, width, [each], width, words, torch.float32)


class ParallelLMHead(VocabParallelEmbedding):
    """A head."""


class RoutedExperts(nn.Module):
    """Experts."""


@dataclass
class WeightsMapper:
    """Names of a checkpoint -> of the model, by prefix."""

    orig_to_new_prefix: dict[str, str] = field(default_factory=dict)
    orig_to_new_stacked: dict[str, Any] = field(default_factory=dict)

    def map_name(self, name: str) -> str | None:
        """Return the name in the model."""
        for old, new in self.orig_to_new_prefix.items():
            name = new + name.removeprefix(old) if name.startswith(old) else name
        return name


class QuantizationConfig:
    """The base of configs."""

    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the classes where the plugin imports them from, for one test."""
    unquantized = type("UnquantizedLinearMethod", (), {})
    contents = {
        f"{_LAYERS}.linear": {
            "LinearBase": LinearBase,
            "LinearMethodBase": object,
            "UnquantizedLinearMethod": unquantized,
        },
        f"{_LAYERS}.quantization": {"register_quantization_config": lambda name: lambda cls: cls},
        f"{_LAYERS}.quantization.base_config": {
            "QuantizationConfig": QuantizationConfig,
            "QuantizeMethodBase": object,
        },
        f"{_LAYERS}.vocab_parallel_embedding": {
            "VocabParallelEmbedding": VocabParallelEmbedding,
            "ParallelLMHead": ParallelLMHead,
        },
        f"{_LAYERS}.fused_moe": {"RoutedExperts": RoutedExperts},
        "vllm.model_executor.models.utils": {"WeightsMapper": WeightsMapper},
    }
    for name, members in contents.items():
        above = ""
        for part in name.split("."):
            above = f"{above}.{part}".lstrip(".")
            if above not in sys.modules or above == name:
                monkeypatch.setitem(sys.modules, above, ModuleType(above))
        vars(sys.modules[name]).update(members)
    for own in ("config", "linear", "embedding"):
        monkeypatch.delitem(sys.modules, f"bitmill.integrations.vllm.{own}", raising=False)
