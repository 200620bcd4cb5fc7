"""Weights that a format cannot store are refused by the name of their layer, and nothing is written."""

from __future__ import annotations

import pytest
import torch

import bitmill
from bitmill.errors import NumericsError
from bitmill.pipeline.ranges import to_stored
from helpers.architectures import WINDOWS
from helpers.tiny_models import tiny_model

LAYER = "model.layers.1.mlp.down_proj"


def model_with(size: float, layer: str = LAYER):
    model = tiny_model("llama", tie_word_embeddings=False)
    weight = model.get_submodule(layer).weight.data
    weight.copy_((weight.double() * (size / float(weight.abs().max()))).float())
    return model


@pytest.mark.parametrize("method", ["nf4", "rtn", "bcq"])
@pytest.mark.parametrize(("size", "reason"), [(1e6, "up to 1e\\+06, above"), (1e-41, "up to 1e-41, below")])
def test_layer_is_named(method, size, reason, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(NumericsError, match=f"weights of {LAYER} are {reason} the range .*--rule '{LAYER}=float'"):
        bitmill.quantize(model_with(size), method, out=out, measure=0)
    assert not out.exists()


def test_layer_in_float_or_another_format(tmp_path):
    model = model_with(1e-20)
    bitmill.quantize(model, "rtn", out=tmp_path / "float", bits=4, measure=0, rules=[f"{LAYER}=float"])
    loaded = bitmill.load(tmp_path / "float")
    assert torch.equal(loaded.get_submodule(LAYER).weight, model.get_submodule(LAYER).weight)
    report = bitmill.quantize(model, "mxfp4", out=tmp_path / "mxfp4", measure=0).report
    errors = {layer["name"]: layer["weight_error"] for layer in report["layers"]}
    assert 1e-3 < errors[LAYER] < 0.05


@pytest.mark.parametrize("layer", ["lm_head", "model.embed_tokens"])
def test_head_is_named(layer, tmp_path):
    with pytest.raises(NumericsError, match=f"weights of {layer} are up to 1e-30, below .*--rule '{layer}=float'"):
        bitmill.quantize(model_with(1e-30, layer), "rtn", out=tmp_path / "out", head_bits=4, measure=0)


@pytest.mark.parametrize("method", ["gptq", "autoround", "aqlm"])
def test_calibrated_methods(method, tmp_path):
    with pytest.raises(NumericsError, match=f"weights of {LAYER} are up to 1e-30"):
        bitmill.quantize(model_with(1e-30), method, out=tmp_path / "out", calib=WINDOWS, measure=0)


def test_float_tensors_stay_finite():
    assert torch.equal(
        to_stored("norm", torch.tensor([1.0, 65504]), torch.float16), torch.tensor([1, 65504]).half()
    )
    with pytest.raises(NumericsError, match=r"norm reaches 1e\+05 after its transforms"):
        to_stored("norm", torch.tensor([1.0, 1e5]), torch.float16)
