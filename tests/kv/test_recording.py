"""Keys and values that calibration learns from."""

from __future__ import annotations

import pytest
import torch

from bitmill.errors import CalibrationError
from bitmill.kv.calibrate import KVRecording, KVSample, calibrate, fit_calibration, record_keys_values
from bitmill.kv.layer import QuantizedLayer
from bitmill.kv.scheme import kv_method
from bitmill.progress import Progress
from helpers.packed_cache import prompt
from helpers.tiny_models import tiny_model

HYBRIDS = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
}


@pytest.mark.parametrize("fisher", [False, True])
@pytest.mark.parametrize("architecture", HYBRIDS)
def test_hybrid_windows_independent(architecture, fisher):
    model = tiny_model(architecture, **HYBRIDS[architecture])
    seen = record_keys_values(model, prompt(tokens=48).repeat(3, 1), fisher).layers
    assert seen[0] is None
    for part in ("keys", "values", *(("key_gradient", "value_gradient") if fisher else ())):
        first, *others = getattr(seen[1], part).split(48)
        assert first.abs().max() > 0
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("constant", [0.0, 3.0, 300.0])
def test_constant_channel(constant):
    keys, values = torch.randn(2, 256, 2, 16, generator=torch.Generator().manual_seed(0))
    values[:, 1, 3] = constant
    seen = KVSample(keys, values, None, None, torch.arange(256))
    method = kv_method("kvquant", pre_rope=False, fisher=False)
    (found,) = fit_calibration(tiny_model("llama"), method, KVRecording([seen], (1, 256), 0.0)).layers
    layer = QuantizedLayer(method.scheme(), found, None)
    later = values[None, :20].transpose(1, 2).clone()
    later[:, 1, :, 3] += torch.linspace(-2, 2, 20)
    layer.append(keys[None, :20].transpose(1, 2), later)
    assert (layer.values - later).abs().max() < 2e-3 * (1 + constant)
    assert found[1].deviation.min() >= 0.01 * found[1].deviation.median()


def test_windows_within_sinks_refused():
    model = tiny_model("llama")
    with pytest.raises(CalibrationError, match=r"33 tokens .* first 4 \(sink\)"):
        calibrate(model, kv_method("kvquant", sink=4), prompt(tokens=33))
    with pytest.raises(CalibrationError, match=r"40 tokens .* first 100"):
        calibrate(model, kv_method("kvquant", sink=100), prompt(3, 40))
    assert calibrate(model, kv_method("kvquant", sink=4), prompt(tokens=36)).layers[0][0].levels is not None


def test_progress():
    class Steps(Progress):
        def __init__(self):
            self.started, self.done = [], 0

        def start(self, task, total):
            self.started.append((task, total))

        def advance(self, steps=1):
            self.done += steps

    model, steps = tiny_model("llama"), Steps()
    method = kv_method("kvquant", fisher=False)
    fit_calibration(model, method, record_keys_values(model, prompt(tokens=64), False), steps)
    assert steps.started == [("learning levels of keys and values", 2)]
    assert steps.done == 2
