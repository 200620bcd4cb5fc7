"""The task of a model decides on its class, its windows, its metric and its loss."""

from __future__ import annotations

import pytest
import torch

from bitmill.architectures.adapter import ADAPTERS
from bitmill.evaluation.embedding import EmbeddingMetrics
from bitmill.evaluation.metrics import LanguageModelMetrics
from bitmill.sources.module import ModuleSource
from bitmill.tasks.base import TASKS, task_for, task_of
from bitmill.tasks.causal_lm import CausalLM
from bitmill.tasks.text_encoder import TextEncoder
from helpers.tiny_models import TEXT_ADAPTERS, tiny_config, tiny_model


def test_config_decides_on_task():
    assert isinstance(task_for(tiny_config("bert")), TextEncoder)
    assert isinstance(task_for({"model_type": "bert"}), TextEncoder)
    for config in (tiny_config("llama"), tiny_config("bloom"), {}, None):
        assert isinstance(task_for(config), CausalLM)


@pytest.mark.parametrize("name", TEXT_ADAPTERS)
def test_every_adapter_names_a_task(name):
    task = TASKS.get(ADAPTERS.get(name).task).for_model()
    assert task.auto_class.__name__ == task.auto_class_name
    assert task_of(ModuleSource(tiny_model(name))).auto_class_name == task.auto_class_name


def test_pooling_is_read_by_encoders_alone_and_when_needed():
    def fail() -> str:
        raise AssertionError

    assert task_for(tiny_config("llama"), fail).metric() == LanguageModelMetrics()
    assert task_for(tiny_config("bert"), lambda: "cls").metric() == EmbeddingMetrics("cls")
    encoder = task_for(tiny_config("bert"), fail)
    with pytest.raises(AssertionError):
        encoder.metric()


def test_loss_of_a_language_model_is_next_token_cross_entropy():
    tokens = torch.tensor([[3, 1, 2]])
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 1] = logits[0, 1, 2] = 50.0
    assert float(CausalLM().loss()(tokens, logits)) == pytest.approx(0.0, abs=1e-6)


def test_losses_of_an_encoder_draw_new_directions():
    hidden = torch.randn(1, 5, 8)
    loss = TextEncoder().loss()
    first, second = loss(torch.zeros(1, 5), hidden), loss(torch.zeros(1, 5), hidden)
    assert first != second
    assert TextEncoder().loss()(torch.zeros(1, 5), hidden) == first
