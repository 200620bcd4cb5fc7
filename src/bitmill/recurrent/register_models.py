"""Registers recurrent language models with transformers' AutoModelForCausalLM, when it is imported."""

from __future__ import annotations

from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from bitmill.recurrent.config import GruConfig, LstmConfig
from bitmill.recurrent.model import GruForCausalLM, LstmForCausalLM

for config, model in ((LstmConfig, LstmForCausalLM), (GruConfig, GruForCausalLM)):
    AutoModelForCausalLM.register(config, model, exist_ok=True)
