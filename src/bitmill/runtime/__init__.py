"""Run quantized models: one linear layer, kernels that say what they support, the transformers hook."""

from bitmill.runtime.embedding import QuantEmbedding
from bitmill.runtime.linear import QuantLinear, swap_linear
from bitmill.runtime.swap import swap_layers

__all__ = ["QuantEmbedding", "QuantLinear", "swap_layers", "swap_linear"]
