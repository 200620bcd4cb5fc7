"""Mistral 7B and its dense successors: the block of Llama with an optional sliding window."""

from dataclasses import replace

from bitmill.architectures.adapter import register
from bitmill.architectures.adapters.llama import LLAMA

MISTRAL = register(replace(LLAMA, name="mistral", model_types=("mistral",)))
