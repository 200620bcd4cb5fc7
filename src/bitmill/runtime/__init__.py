"""Run quantized models: one linear layer, kernels that say what they support, the transformers hook."""

from bitmill.runtime.linear import QuantLinear, swap_linear

__all__ = ["QuantLinear", "swap_linear"]
