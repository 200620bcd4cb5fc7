"""Every architecture with every method: quantize to a folder, load it again, run it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import nn

import bitmill
from bitmill.architectures.inputs import hook_inputs
from bitmill.calibration.collect import find_stages
from bitmill.calibration.repeated_forward import stage_forward
from bitmill.checkpoint.reader import open_checkpoint
from bitmill.errors import RecipeError
from bitmill.models.streamed import StreamedModel
from bitmill.recipes.attention import attach_attention
from bitmill.recipes.method import METHODS, build_recipe
from bitmill.runtime.modules.linear import QuantLinear
from bitmill.runtime.modules.packed import PackedMatrix
from bitmill.sources.module import ModuleSource
from bitmill.tasks.base import task_for
from bitmill.workflows.quantize.run import Outcome
from helpers.architectures import MODELS, TOKENS, WINDOWS, answer, model_of, stored_bytes
from helpers.cases import method_options
from helpers.selection import FULL, thin

PRODUCT = [(name, method) for name in MODELS for method in METHODS.names()]
MAIN, LIVE, SIMPLE = ("llama", "gpt2", "bert"), ("llama", "gpt2", "bert", "gpt_neox"), ("rtn", "gptq")
BRIEF = {
    "iters": 10,
    "epochs": 1,
    "rounds": 2,
    "sweeps": 1,
}  # short training, for tests that do not measure its effect


def quantize(model: nn.Module, method: str, out=None, **options):
    options = method_options(method, group_size=20, **options)  # ragged in 32 and in 48 columns
    return bitmill.quantize(model, method, calib=WINDOWS, out=out, measure=0, **options)


@pytest.fixture(scope="module")
def outcome_of(tmp_path_factory) -> Callable[[str, str], Outcome]:
    """Return the outcome of a method on a model, in a folder; computed once."""

    @cache
    def made(name: str, method: str) -> Outcome:
        model, out = model_of(name), tmp_path_factory.mktemp(f"{name}-{method}") / "quantized"
        before = {k: v.clone() for k, v in model.state_dict().items()}
        outcome = quantize(model, method, out, **BRIEF)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # the source stays as it was
        return outcome

    return made


def live_dequantized(model: nn.Module, folder) -> nn.Module:
    """The float model with the decoded weights of the folder, and its float tensors, which may have changed."""
    live, checkpoint = copy.deepcopy(model), open_checkpoint(folder)
    for name, parameter in live.named_parameters():
        if name in checkpoint.files:
            parameter.data = checkpoint.tensor(name).to(parameter.dtype)
    for name in checkpoint.formats:
        linear, quantized = live.get_submodule(name), checkpoint.quantized(name)
        W = quantized.dequantize()
        linear.weight.data = W if isinstance(linear, nn.Linear | nn.Embedding) else W.T.contiguous()
        hook_inputs(linear, quantized.rounding)
    attach_attention(live, checkpoint.config["quantization_config"].get("recipe"))
    return live


@pytest.mark.parametrize(("name", "method"), thin(PRODUCT, lambda pair: pair[0] in MAIN or pair[1] in SIMPLE))
@torch.no_grad()
def test_loaded_equals_dequantized(name, method, outcome_of):
    model, outcome = model_of(name), outcome_of(name, method)
    out = outcome.out
    ours = bitmill.load(out)
    theirs = task_for(model.config).auto_class.from_pretrained(out, dtype=torch.float32).eval()
    logits = answer(ours)
    assert torch.equal(logits, answer(theirs))
    expected = answer(live_dequantized(model, out))
    # an input at the border of two levels may be rounded to either
    rounds = any(format.quantizes_inputs for format in open_checkpoint(out).formats.values())
    tolerance = 2e-2 if rounds else 1e-4
    assert torch.allclose(logits, expected, rtol=1e-4, atol=tolerance * float(expected.abs().max()))

    layers = {
        n: m for n, m in ours.named_modules() if isinstance(m, PackedMatrix) and not getattr(m, "tied", None)
    }
    assert sorted(layers) == sorted(open_checkpoint(out).formats)
    assert sum(not layer.outside_blocks for layer in layers.values()) == outcome.summary["layers"]
    in_memory = sum(t.nbytes for t in (*ours.parameters(), *ours.buffers()))
    assert abs(in_memory - stored_bytes(out)) <= 0.1 * stored_bytes(out)


@pytest.mark.parametrize(
    ("name", "method"),
    [pair for pair in thin(PRODUCT, lambda pair: pair[0] == "llama" or pair[1] in SIMPLE) if pair[0] in LIVE],
)
@torch.no_grad()
def test_in_place_equals_stored(name, method, outcome_of):
    model = model_of(name)
    stored = answer(bitmill.load(outcome_of(name, method).out))
    outcome = quantize(model, method, **BRIEF)
    assert outcome.model is model
    assert any(isinstance(m, QuantLinear) for m in model.modules())
    assert torch.equal(answer(model), stored)


@pytest.mark.parametrize("method", METHODS.names())
def test_deterministic_bytes(method, outcome_of, tmp_path):
    one, other = outcome_of("llama", method).out, tmp_path / "quantized"
    quantize(model_of("llama"), method, other, **BRIEF)
    files = sorted(f.name for f in one.iterdir())
    assert files == sorted(f.name for f in other.iterdir())
    for file in files:
        assert (one / file).read_bytes() == (other / file).read_bytes(), file


def has_bits(method: str, bits: int) -> bool:
    try:
        return bool(build_recipe(method, {"bits": bits}))
    except RecipeError:
        return False


@pytest.mark.parametrize("method", METHODS.names())
@torch.no_grad()
def test_more_bits_lower_kl(method, tmp_path):
    if "bits" not in METHODS.get(method).__dataclass_fields__:
        pytest.skip("this method has no bits to set")
    model = model_of("llama")
    reference = torch.log_softmax(model(TOKENS).logits, -1)
    far, small = [], method_options(method, codebook_bits=4)  # 256 vectors would hold a tiny matrix whole
    accepted = [bits for bits in (2, 3, 4) if has_bits(method, bits)]
    for bits in accepted[:2]:
        quantize(model, method, tmp_path / str(bits), bits=bits, **small, **({} if FULL else BRIEF))
        logits = torch.log_softmax(bitmill.load(tmp_path / str(bits))(TOKENS).logits, -1)
        far.append(float((reference.exp() * (reference - logits)).sum(-1).mean()))
    assert far[1] < far[0]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_staged_forward_equals_plain(name):
    streamed = StreamedModel(ModuleSource(model_of(name)))
    with streamed.non_block_weights():
        batches = [streamed.embed(tokens) for tokens in (WINDOWS[:4], WINDOWS[4:])]
        hidden = [start for start, _ in batches]
        for index in range(len(streamed.blocks)):
            block = streamed.load_block(index)
            calls = [c[index] for _, c in batches]
            stages = find_stages(streamed.adapter, block, hidden[0], calls[0])
            assert sorted(n for stage in stages for n in stage) == sorted(streamed.adapter.linears)
            plain = [call.run(block, h) for call, h in zip(calls, hidden)]
            staged_forward = stage_forward(streamed.adapter.recurrent)
            with staged_forward(block, [h.clone() for h in hidden], calls, [s[0] for s in stages]) as forward:
                for stage in stages:
                    inputs = list(forward.inputs(stage[0]))
                    assert [len(X) for X in inputs] == [4 * 16, 2 * 16]
                staged = forward.outputs()
            assert all(torch.equal(a, b) for a, b in zip(plain, staged))
            hidden = plain
        logits = streamed.head(WINDOWS[:4], hidden[0])
    assert torch.allclose(logits, answer(model_of(name), WINDOWS[:4]), rtol=1e-4, atol=1e-4)


def test_ignored_layers_stay_float(tmp_path):
    recipe = bitmill.Recipe.from_dict({**bitmill_recipe("rtn"), "ignore": ["*.down_proj", "model.layers.0.*"]})
    bitmill.quantize(model_of("llama"), recipe, out=tmp_path / "out", measure=0)
    names = open_checkpoint(tmp_path / "out").formats
    assert names
    assert all(n.startswith("model.layers.1.") and not n.endswith("down_proj") for n in names)
    assert torch.isfinite(bitmill.load(tmp_path / "out")(TOKENS).logits).all()


def bitmill_recipe(name: str) -> dict:
    return METHODS.get(name)().recipe().to_dict()


def test_transforms_are_stored(tmp_path):
    """An equalized model at 8 bits is the float model, so what was folded was also stored."""
    for name in ("llama", "opt", "gemma2", "bert"):
        model = model_of(name)
        described = {**bitmill_recipe("rtn"), "weight": {"format": "uniform", "bits": 8, "group_size": 16}}
        recipe = bitmill.Recipe.from_dict({**described, "transforms": [{"transform": "equalize"}]})
        bitmill.quantize(model, recipe, out=tmp_path / name, measure=0)
        with torch.no_grad():
            expected, logits = answer(model), answer(bitmill.load(tmp_path / name))
        assert (logits - expected).norm() < 0.05 * expected.norm()
