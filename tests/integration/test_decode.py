"""The decode step with default settings, from a quantized folder to an unpacked model."""

from __future__ import annotations

import pytest
import torch

import bitmill
from bitmill.native import is_available
from bitmill.runtime.decode import decode_path, detach
from bitmill.runtime.modules.dequantize import dequantize_model
from helpers.workspace import save_model, write_text

pytestmark = pytest.mark.skipif(not is_available(), reason="the compiled kernels are not installed")

PROMPT = torch.tensor([[5, 17, 99, 3, 42, 8, 61]])


@pytest.mark.parametrize("head_bits", [None, 8])
def test_from_folder_to_float(head_bits, tmp_path, monkeypatch):
    for name in ("BITMILL_KERNEL", "BITMILL_ACTIVATIONS", "BITMILL_DECODE"):
        monkeypatch.delenv(name, raising=False)
    calibration = bitmill.CalibrationData(str(write_text(tmp_path / "text.txt")), 4, 32)
    more = {"calib": calibration, "measure": 0, "group_size": 16, "head_bits": head_bits}
    bitmill.quantize(save_model(tmp_path / "source"), "rtn", out=tmp_path / "done", **more)
    model = bitmill.load(tmp_path / "done")

    def text():
        made = model.generate(PROMPT, max_new_tokens=12, min_new_tokens=12, do_sample=False)
        assert decode_path(model) == "step"
        return made

    first, tensors = text(), {name: t.clone() for name, t in model.state_dict().items()}
    assert torch.equal(text(), first)
    assert all(torch.equal(t, tensors[name]) for name, t in model.state_dict().items())
    dequantize_model(model)
    unpacked = text()
    assert torch.equal(
        detach(model).generate(PROMPT, max_new_tokens=12, min_new_tokens=12, do_sample=False), unpacked
    )
    assert unpacked.shape == first.shape
