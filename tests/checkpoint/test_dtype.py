"""A folder states a dtype in which the model can run."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import bitmill
from bitmill.checkpoint.dtype import stated_dtype
from bitmill.models.streamed import StreamedModel
from bitmill.sources.hf import HfSource
from helpers.workspace import save_model, write_text


@pytest.fixture
def source(tmp_path):
    folder = save_model(tmp_path / "source")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).save_pretrained(folder)
    return folder


def test_range_of_the_hidden_states(source, monkeypatch):
    streamed = StreamedModel(HfSource(source))
    assert stated_dtype(streamed) == torch.float16
    monkeypatch.setattr(HfSource, "states_dtype", False)
    assert stated_dtype(streamed) == torch.float32
    for largest, dtype in [(3.0, torch.float16), (30000.0, torch.float16), (33000.0, torch.float32)]:
        streamed.largest_hidden_state = largest
        assert stated_dtype(streamed) == dtype


@pytest.mark.parametrize(("gain", "dtype"), [(1.0, "float16"), (1e5, "float32")])
def test_what_is_stated_runs(source, tmp_path, gain, dtype):
    model = AutoModelForCausalLM.from_pretrained(source)
    model.model.norm.weight.data /= gain
    with torch.no_grad():
        for block in model.model.layers:  # the outputs of the first block leave the range of float16
            block.mlp.down_proj.weight *= min(gain, 3e3)
            block.mlp.up_proj.weight *= max(gain / 3e3, 1.0)
    model.save_pretrained(source)
    text = write_text(tmp_path / "text.txt")
    calibration = bitmill.CalibrationData(str(text), 4, 32)
    out = tmp_path / "out"
    bitmill.quantize(source, "rtn", bits=4, group_size=16, out=out, calib=calibration, measure=2)
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert bool(torch.isfinite(loaded(torch.arange(3, 30)[None]).logits).all())
