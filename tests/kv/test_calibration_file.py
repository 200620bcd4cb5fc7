"""KV calibrations of live models, and their predicted size."""

from __future__ import annotations

import pytest
import torch

import bitmill
from bitmill.kv.calibrate import calibrate
from bitmill.kv.calibration_file import read_calibration
from bitmill.kv.config import parse_kv_config
from bitmill.kv.size import cache_size, calibration_bytes, packed_shapes
from helpers.workspace import build_workspace


@pytest.fixture
def workspace(tmp_path):
    return build_workspace(tmp_path)


@pytest.mark.parametrize(
    "options", ["", "q_norm=true", "channel_levels=false", "fisher=false", "nuq=false", "equalize=false"]
)
def test_calibration_size(workspace, options):
    model = bitmill.load(workspace.source)
    method = parse_kv_config(f"kvquant:{options}", 2, None).method()
    found = calibrate(model, method, torch.randint(3, 120, (2, 64)))
    size = sum(tensor.nbytes for tensor in found.tensors().values())
    assert calibration_bytes(model, method) == size
    (shape,) = set(packed_shapes(model).values())
    layers = len(packed_shapes(model))
    fixed = 0 if method.nuq else layers * 4 * 2 * 4  # levels that are not learned are no part of it
    assert (
        cache_size(method.scheme(), *shape, layers, 1, uses_gradients=method.uses_gradients).tables == size + fixed
    )


def test_live_models(workspace):
    model, tokenizer = bitmill.load(workspace.source), bitmill.load_tokenizer(workspace.source)
    with pytest.raises(bitmill.BitmillError, match="Nowhere to write"):
        bitmill.quantize(model, "rtn", kv="kivi", kv_options={"group": 8}, tokenizer=tokenizer, measure=0)
    windows = torch.randint(3, 120, (4, 64))
    out = workspace.root / "live"
    bitmill.quantize(model, "rtn", kv="kvquant", calib=windows, tokenizer=tokenizer, measure=0, out=out)
    assert read_calibration(out).about["source"] == "tokens"
    bitmill.quantize(model, "rtn", group_size=16, tokenizer=tokenizer, measure=0)
    result = bitmill.evaluate(
        model, kv="kvquant", kv_samples=3, tokenizer=tokenizer, seqlen=64, windows=1, text=workspace.text
    )
    assert result["kv_method"] == "kvquant"  # gradients were computed on a copy
    assert not any(isinstance(m, torch.nn.Linear) for m in model.model.layers[0].mlp.children())


def test_numbers_are_finite(workspace):
    method = parse_kv_config("kvquant", 2, None).method()
    found = calibrate(bitmill.load(workspace.source), method, torch.randint(3, 120, (2, 64)))
    levels = found.layers[1][1].levels
    assert levels is not None
    levels.view(-1)[3] = float("nan")
    found.save(workspace.root)
    with pytest.raises(bitmill.BitmillError, match=r"tensor 'layers.1.values.levels' of .* holds NaN or Inf"):
        read_calibration(workspace.root)
