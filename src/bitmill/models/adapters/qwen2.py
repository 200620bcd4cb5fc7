"""Qwen 2 and 2.5 (dense): Llama's block with biases on q, k and v."""

from dataclasses import replace

from bitmill.models.adapter import register
from bitmill.models.adapters.llama import LLAMA

QWEN2 = register(replace(LLAMA, name="qwen2", model_types=("qwen2",)))
