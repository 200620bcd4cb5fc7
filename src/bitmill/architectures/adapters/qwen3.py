"""Qwen 3 (dense): the block of Llama with a norm on every head of q and k."""

from dataclasses import replace

from bitmill.architectures.adapter import register
from bitmill.architectures.adapters.llama import LLAMA

QWEN3 = register(replace(LLAMA, name="qwen3", model_types=("qwen3",)))
