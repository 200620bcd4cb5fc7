"""Calibration of every block on the float model, and shared statistics."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitmill
from bitmill.calibration.streams import Streams
from bitmill.errors import CalibrationError, RecipeError
from bitmill.pipeline import block, loop
from helpers.tiny_models import tiny_model

WINDOWS = torch.randint(3, 128, (6, 16), generator=torch.Generator().manual_seed(7))
TOKENS = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(8))


def logits(method: str = "gptq", architecture: str = "llama", **options) -> torch.Tensor:
    model = tiny_model(architecture)
    bitmill.quantize(model, method, calib=WINDOWS, measure=0, bits=3, **options)
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("architecture", ["llama", "olmo"])  # the second one is walked over generically
def test_shared_statistics(architecture, tmp_path, monkeypatch):
    def shared(method: str = "gptq") -> torch.Tensor:
        return logits(method, architecture, propagate="float", statistics=tmp_path / "s")

    alone = logits(architecture=architecture, propagate="float")
    assert torch.equal(shared(), alone)
    monkeypatch.setattr(loop, "Streams", None)  # no text travels through the blocks any more
    assert torch.equal(shared(), alone)
    assert not torch.equal(shared("gptqt"), alone)


def test_flipped_bit_refused(tmp_path):
    """In statistics and squared gradients; files of earlier versions have no digest and are read as they are."""
    for method, name in (("gptq", "block-00000"), ("squeezellm", "fisher-00001")):
        options = {"propagate": "float", "statistics": tmp_path}
        first = logits(method, **options)
        file = tmp_path / f"{name}.safetensors"
        tensors, content = load_file(file), bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
        with pytest.raises(CalibrationError, match="its digest differs"):
            logits(method, **options)
        save_file(tensors, file, {"format": "pt"})
        assert torch.equal(logits(method, **options), first)


def test_stated_dtype_of_shared_statistics(tmp_path):
    """The hidden states of the calibration windows decide it, also where they were computed by an earlier run."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight *= 1e3
        model.model.layers[0].mlp.up_proj.weight *= 1e3
    model.half().save_pretrained(tmp_path / "source")
    for out in ("one", "other"):
        options = {"measure": 0, "propagate": "float", "statistics": tmp_path / "s", "out": tmp_path / out}
        bitmill.quantize(tmp_path / "source", "gptq", calib=WINDOWS, **options)
    assert json.loads((tmp_path / "one" / "config.json").read_text())["dtype"] == "float32"
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes(), file.name


def test_later_blocks_differ():
    layers = []
    for propagate in ("float", "quantized"):
        outcome = bitmill.quantize(
            tiny_model("llama"), "gptq", calib=WINDOWS, measure=0, bits=2, propagate=propagate
        )
        layers.append([layer["output_error"] for layer in outcome.report["layers"]])
    first = 3  # q, k and v read what both have in common
    assert layers[0][:first] == pytest.approx(layers[1][:first], rel=1e-4)
    assert layers[0][first:] != pytest.approx(layers[1][first:], rel=1e-4)


def test_no_earlier_errors(tmp_path):
    plain = logits("gptq", propagate="float", statistics=tmp_path)
    assert torch.allclose(logits("gptaq", propagate="float", statistics=tmp_path), plain, atol=1e-4)


def test_float_block_runs_once(monkeypatch):
    """The pass that compares inputs yields the float block's outputs: bytes are those of a pass of its own."""
    ran = []
    forward = Streams.float_outputs
    monkeypatch.setattr(Streams, "float_outputs", lambda *given: ran.append(given) or forward(*given))
    once = logits("gptaq", propagate="quantized")
    assert not ran
    monkeypatch.setattr(block, "_compares_once", lambda job: False)
    assert torch.equal(logits("gptaq", propagate="quantized"), once)
    assert ran


def test_gptaq_equals_gptq():
    assert torch.allclose(logits("gptaq", propagate="quantized", alpha=0.0), logits("gptq"), atol=1e-4)
    assert not torch.allclose(logits("gptaq", propagate="quantized", alpha=1.0), logits("gptq"), atol=1e-4)


def test_other_text_refused(tmp_path):
    logits(propagate="float", statistics=tmp_path)
    with pytest.raises(CalibrationError, match="another model, text, device or version"):
        bitmill.quantize(
            tiny_model("llama"),
            "gptq",
            calib=WINDOWS + 1 - 1 * (WINDOWS > 100),
            measure=0,
            propagate="float",
            statistics=tmp_path,
        )


def test_quantized_statistics_refused(tmp_path):
    with pytest.raises(RecipeError, match="propagate"):
        logits(statistics=tmp_path)
