"""A plugin of vLLM that serves bitmill's folders; vLLM imports it by the entry point `vllm.general_plugins`."""

from __future__ import annotations


def register() -> None:
    """Register the format with vLLM, once in every process that it starts."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from bitmill.checkpoint.schema import QUANT_METHOD
    from bitmill.integrations.vllm.config import BitmillConfig

    register_quantization_config(QUANT_METHOD)(BitmillConfig)
