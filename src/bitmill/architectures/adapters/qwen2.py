"""Qwen 2 and 2.5 (dense): the block of Llama with biases on q, k and v."""

from dataclasses import replace

from bitmill.architectures.adapter import register
from bitmill.architectures.adapters.llama import LLAMA

QWEN2 = register(replace(LLAMA, name="qwen2", model_types=("qwen2",)))
