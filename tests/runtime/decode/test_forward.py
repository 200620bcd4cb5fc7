"""The decode step against the forward of transformers, on every model shape and every kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bitmill import native
from bitmill.formats import FORMATS
from bitmill.formats.outlier_columns import OutlierColumns
from bitmill.formats.quantized import nearest_matrix
from bitmill.formats.quantized_inputs import QuantizedInputs
from bitmill.formats.rotated import Rotated
from bitmill.formats.uniform import Uniform
from bitmill.runtime.decode import attach, decode_path
from bitmill.runtime.kernels.additive import AdditiveKernel
from bitmill.runtime.modules.embedding import replace_embedding
from bitmill.runtime.modules.linear import replace_linear
from helpers.cases import all_wrappers, few_formats, fitted
from helpers.decoding import PROMPT, both, is_stepping, logits, odd_model, quantize, relative_error
from helpers.native_kernels import ISAS, needs_native

pytestmark = needs_native

LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
MODELS = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 6, "tie_word_embeddings": True}),
    ("llama", {"num_key_value_heads": 1, "head_dim": 64, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}}),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {}),
    ("qwen3", {"head_dim": 20}),
]
TOKENS = [7, 3, 100, 0, 55]
UNIFORM = FORMATS.get("uniform")(4, 16)


def limit_of(model) -> float:
    """Sums in another order; tables of products are integers, and one that rounds the other way is a step off."""
    kernel = model.model.layers[0].self_attn.q_proj.kernel
    return 1e-3 if kernel.tolerance == AdditiveKernel.tolerance else 1e-5


@pytest.fixture(autouse=True)
def _compiled(monkeypatch):
    monkeypatch.delenv("BITMILL_KERNEL", raising=False)
    monkeypatch.setenv("BITMILL_ACTIVATIONS", "float32")


@pytest.mark.parametrize(("kind", "changes"), MODELS, ids=repr)
def test_float_models(kind, changes):
    model = odd_model(kind, **changes)
    expected, found = both(model, TOKENS)
    assert decode_path(model) == "step"
    assert is_stepping(model)
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize(("kind", "changes"), MODELS, ids=repr)
def test_greedy_text(kind, changes):
    model = quantize(odd_model(kind, **changes), UNIFORM)
    expected = model.generate(PROMPT, max_new_tokens=40, do_sample=False)
    assert torch.equal(attach(model).generate(PROMPT, max_new_tokens=40, do_sample=False), expected)
    assert is_stepping(model)


@pytest.mark.parametrize("format", [*few_formats(), *all_wrappers()], ids=repr)
def test_every_format(format):
    model = quantize(odd_model(), format)
    first = model.model.layers[0].self_attn.q_proj
    if first.kernel_on(torch.device("cpu")).step_linear() is None:
        assert "transformers' own forward" in decode_path(attach(model))
        return
    expected, found = both(model, TOKENS)
    assert is_stepping(model)
    assert relative_error(found, expected) < limit_of(model)


@pytest.mark.parametrize(
    "inputs", [Uniform(8, "row", symmetric=True), Uniform(8, "row"), Uniform(4, 16)], ids=repr
)
@pytest.mark.parametrize(
    "around",
    [
        lambda f: f,
        lambda f: replace(f, threshold=1.5),
        lambda f: Rotated(f, sides="in"),
        lambda f: OutlierColumns(f, 3),
        lambda f: OutlierColumns(Rotated(f, sides="in"), 16),
    ],
    ids=["plain", "threshold", "rotated", "outliers", "rotated between outliers"],
)
def test_rounded_inputs(inputs, around, monkeypatch):
    monkeypatch.delenv("BITMILL_ACTIVATIONS")
    model = quantize(odd_model(), around(QuantizedInputs(UNIFORM, inputs)))
    expected, found = both(model, TOKENS)
    assert is_stepping(model)
    assert relative_error(found, expected) < 0.05  # a few inputs are rounded to another integer


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("act", ["float32", "int16", "int8"])
def test_every_instruction_set(isa, act, monkeypatch):
    monkeypatch.setenv("BITMILL_ACTIVATIONS", act)
    before = native.native().isa()
    native.native().use_isa(isa)
    try:
        model = quantize(odd_model("qwen2", head_dim=80), UNIFORM)
        expected, found = both(model, TOKENS)
        assert is_stepping(model)
        # a sum that rounds to another integer moves an input by a step of its own
        assert relative_error(found, expected) < {"float32": 1e-5, "int16": 1e-4, "int8": 3e-2}[act]
    finally:
        native.native().use_isa(before)


@pytest.mark.parametrize("format", [UNIFORM, *all_wrappers()[:3], FORMATS.get("additive")(3)], ids=repr)
@pytest.mark.parametrize("threads", [2, 3])
def test_several_threads(threads, format):
    model = quantize(odd_model(), format)
    expected, found = both(model, TOKENS)
    limit = limit_of(model)
    torch.set_num_threads(threads)
    try:
        assert relative_error(logits(model, TOKENS)[0], found) < limit
    finally:
        torch.set_num_threads(1)
    assert relative_error(found, expected) < limit


def test_bfloat16_models():
    model = odd_model().to(torch.bfloat16)
    expected = logits(odd_model().to(torch.bfloat16).to(torch.float32), TOKENS)[0]
    own, found = both(model, TOKENS)
    assert is_stepping(model)
    assert found.dtype == torch.bfloat16
    assert relative_error(found.float(), expected) < relative_error(own.float(), expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_tied_quantized_embedding(bits):
    model, format = odd_model(tie_word_embeddings=True), FORMATS.get("uniform")(bits, 21)
    W = model.lm_head.weight.detach()
    packed = nearest_matrix(format, W, fitted(format, W, search=False)).pack()
    table = replace_embedding(model, "model.embed_tokens", format)
    table._buffers.update(packed)
    replace_linear(model, "lm_head", format, tied=table)
    expected, found = both(model, TOKENS)
    assert is_stepping(model)
    assert vars(model)["forward"]._plan._table is not None
    assert relative_error(found, expected) < 1e-5
