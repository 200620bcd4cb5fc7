"""Body and head of a model apart give the logits of the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from bitmill.evaluation import logits
from bitmill.evaluation.logits import DeferredLogits, slices
from bitmill.models.block_call import output_fn
from bitmill.models.split import deferred_output_fn, recorded_output_fn, share_equal_parameters, split_model
from bitmill.models.streamed import StreamedModel
from bitmill.progress import Progress
from bitmill.sources.module import ModuleSource
from helpers.architectures import TOKENS, model_of
from helpers.logits import read
from helpers.tiny_models import SIZES, TEXT_ADAPTERS, tiny_model

DECODERS = [name for name in [*TEXT_ADAPTERS, "gpt_neox"] if name != "bert"]
SCALED = {  # of the logits, after the head
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 5.0},
    "gemma2": {"final_logit_softcapping": 0.5},
}


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    monkeypatch.setattr(logits, "POSITIONS", 5)


def scaled(model_type: str) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES, **SCALED[model_type])
    return AutoModelForCausalLM.from_config(config).float().eval()


@torch.no_grad()
def assert_split(model: nn.Module) -> None:
    expected, found = output_fn(model)(TOKENS), deferred_output_fn(model)(TOKENS)
    assert isinstance(found, DeferredLogits)
    torch.testing.assert_close(read(found, TOKENS), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(output_fn(model)(TOKENS), expected, rtol=0, atol=0)  # left as it was


@pytest.mark.parametrize("name", DECODERS)
def test_logits_of_the_model(name):
    assert_split(model_of(name))


@pytest.mark.parametrize("name", SCALED)
def test_scales_after_the_head(name):
    assert_split(scaled(name))


def test_head_sees_one_position_while_the_body_runs():
    model, seen = tiny_model("llama"), []
    split = split_model(model, TOKENS)
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-2]))
    output = split(TOKENS)
    assert seen == [1]
    assert output[1, slice(2, 5)].shape == (3, 128)
    assert seen == [1, 3]


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_recorded_outputs(tied):
    """They outlive the blocks, and the head keeps its matrix."""
    model = tiny_model("llama", tie_word_embeddings=tied)
    expected = output_fn(model)(TOKENS)
    run = recorded_output_fn(model, TOKENS.split(1), Progress(), free_body=True)
    assert all(parameter.is_meta for parameter in model.model.layers.parameters())
    assert model.model.embed_tokens.weight.is_meta is not tied
    for window in range(2):
        tokens = TOKENS[window][None]
        torch.testing.assert_close(read(run(tokens), tokens), expected[window][None], rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_equal_parameters_are_shared():
    model, other = tiny_model("llama"), tiny_model("llama")
    other.model.layers[0].mlp.up_proj.weight.add_(1)
    expected = output_fn(model)(TOKENS)
    share_equal_parameters(model, other)
    assert model.lm_head.weight is other.lm_head.weight
    assert model.model.layers[0].mlp.up_proj.weight is not other.model.layers[0].mlp.up_proj.weight
    assert torch.equal(output_fn(model)(TOKENS), expected)
    share_equal_parameters(model, tiny_model("llama", vocab_size=64))  # other shapes
    share_equal_parameters(model, tiny_model("llama").to("meta"))
    assert torch.equal(output_fn(model)(TOKENS), expected)


@torch.no_grad()
def test_encoder_is_whole():
    model = tiny_model("bert")
    assert split_model(model, TOKENS) is None
    assert torch.equal(deferred_output_fn(model)(TOKENS), output_fn(model)(TOKENS))


@torch.no_grad()
def test_head_that_mixes_positions_is_whole():
    model = tiny_model("llama")
    head = model.lm_head.forward
    model.lm_head.forward = lambda hidden: head(hidden.cumsum(1))
    assert split_model(model, TOKENS) is None
    assert torch.equal(deferred_output_fn(model)(TOKENS), output_fn(model)(TOKENS))


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_streamed_head(name):
    streamed, hidden = StreamedModel(ModuleSource(model_of(name))), torch.randn(2, 16, 32)
    with streamed.non_block_weights():
        expected, found = streamed.head(TOKENS, hidden), streamed.deferred_head(TOKENS, hidden)
        assert isinstance(found, DeferredLogits)
        torch.testing.assert_close(read(found, TOKENS), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("length", [1, 5, 6, 11, 64])
def test_slices(length):
    """They cover all positions in order, and none is short."""
    found = [range(length)[positions] for positions in slices(length)]
    assert [i for part in found for i in part] == list(range(length))
    assert max(map(len, found)) <= 5
    assert max(map(len, found)) - min(map(len, found)) <= 1
