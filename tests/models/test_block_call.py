"""A block called for some windows of a batch gives what it gives for them within the batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from bitmill.models.block_call import BlockCall, rows_of_windows
from bitmill.models.streamed import StreamedModel
from bitmill.sources.module import ModuleSource
from helpers.tiny_models import tiny_model

SIZES = {"vocab_size": 128, "hidden_size": 32, "n_layer": 1, "n_head": 4}

FALCON = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "alibi": True}


def other(kind: str, **sizes) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).float().eval()


MODELS = {
    "bloom": lambda: other("bloom", **SIZES),
    "mpt": lambda: other(
        "mpt", vocab_size=128, d_model=32, n_layers=1, n_heads=4, max_seq_len=64, expansion_ratio=2
    ),
    "falcon": lambda: other("falcon", **FALCON),
    "llama": lambda: tiny_model("llama"),
    "gemma3_text": lambda: tiny_model("gemma3_text"),
    "bert": lambda: tiny_model("bert"),
    "opt": lambda: tiny_model("opt"),
}


@pytest.mark.parametrize("windows", [1, 3, 4, 5])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_part_of_batch(name, windows):
    streamed = StreamedModel(ModuleSource(MODELS[name]()))
    streamed.load(streamed.names())
    hidden, calls = streamed.embed(torch.randint(3, 128, (windows, 8)))
    for block, call in zip(streamed.blocks, calls):
        whole = call.run(block, hidden)
        for start, stop in {(0, 1), (windows // 2, windows), (0, windows + 3)}:
            part = call.cut(windows, start, stop).run(block, hidden[start:stop])
            assert torch.allclose(part, whole[start:stop], rtol=1e-5, atol=1e-6)
        hidden = whole


def test_shapes_tell_windows_apart():
    def call(windows: int) -> BlockCall:
        alibi, bias, angles = torch.zeros(4 * windows, 1, 6), torch.zeros(4, 1, 6), torch.zeros(3, windows, 6)
        return BlockCall((None, alibi), {"bias": bias, "angles": (angles, [angles])})

    whole = BlockCall(call(4).args, call(4).kwargs, rows_of_windows(call(1), call(2)))
    part = whole.cut(4, 1, 3)
    assert part.args[1].shape == (8, 1, 6)
    assert part.kwargs["bias"].shape == (4, 1, 6)
    assert part.kwargs["angles"][0].shape == part.kwargs["angles"][1][0].shape == (3, 2, 6)
