"""Registers the configs of recurrent language models with transformers' AutoConfig, when it is imported."""

from __future__ import annotations

from transformers.models.auto.configuration_auto import AutoConfig

from bitmill.recurrent.config import GruConfig, LstmConfig

for config in (LstmConfig, GruConfig):
    AutoConfig.register(config.model_type, config, exist_ok=True)
