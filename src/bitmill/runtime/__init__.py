"""Run quantized models: one linear layer, kernels that say what they support, the transformers hook."""

from bitmill.runtime.modules.embedding import QuantEmbedding
from bitmill.runtime.modules.linear import QuantLinear, swap_linear
from bitmill.runtime.modules.replace import swap_layers

__all__ = ["QuantEmbedding", "QuantLinear", "swap_layers", "swap_linear"]
