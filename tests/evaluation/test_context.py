"""The longest context is found under the name that the config of each architecture uses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import AutoConfig

from bitmill.data.windows import check_context_length
from bitmill.errors import CalibrationError
from bitmill.evaluation.context import context_length


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("llama", {"max_position_embeddings": 64}),
        ("gpt2", {"n_positions": 64}),
        ("gptj", {"n_positions": 64}),
        ("mpt", {"max_seq_len": 64}),
        ("ctrl", {"n_positions": 64}),
        ("llava", {"text_config": {"model_type": "llama", "max_position_embeddings": 64}}),
    ],
)
def test_names(kind, sizes):
    config = AutoConfig.for_model(kind, **sizes)
    assert context_length(config) == 64
    check_context_length(config, 64)
    with pytest.raises(CalibrationError, match="at most 64 tokens"):
        check_context_length(config, 65)


@pytest.mark.parametrize("name", ["n_ctx", "max_sequence_length", "seq_length"])
def test_names_in_remote_code(name):
    assert context_length(SimpleNamespace(**{name: 64})) == 64


@pytest.mark.parametrize(
    "config", [None, SimpleNamespace(), SimpleNamespace(n_ctx=-1), SimpleNamespace(n_ctx="9")]
)
def test_no_limit(config):
    assert context_length(config) is None
    check_context_length(config, 10**9)
