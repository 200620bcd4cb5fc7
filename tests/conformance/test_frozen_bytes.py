"""Bytes written by earlier versions decode to the recorded numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bitmill.formats import FORMATS, Wrapper
from bitmill.formats.quantized import unpack

FIXTURES = Path(__file__).parent.parent / "fixtures"
CASES = [
    pytest.param(file, index, case, id=f"{file.stem}-{index}")
    for file in sorted(FIXTURES.glob("*.json"))
    for index, case in enumerate(json.loads(file.read_text()))
]


@pytest.mark.parametrize("name", FORMATS.names())
def test_formats_have_frozen_bytes(name):
    for ending in ("safetensors", "json"):
        file = FIXTURES / f"{name}.{ending}"
        assert file.exists(), f"run: python tests/fixtures/make.py {name}"


@pytest.mark.parametrize(("file", "index", "case"), CASES)
def test_frozen_bytes_decode(file, index, case):
    format, shape = FORMATS.from_dict(case["format"]), tuple(case["shape"])
    prefix = f"{index}."
    stored = load_file(file.with_suffix(".safetensors"))
    tensors = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
    assert format.damage_reason(tensors, shape) is None
    quantized = unpack(format, tensors, shape)
    expected = torch.tensor(case["decoded"], dtype=torch.float32)
    # wrappers may sum, as rotations do, and the last digit of a sum belongs to the machine
    digits = 1e-6 * float(expected.abs().max()) if isinstance(format, Wrapper) else 0.0
    assert torch.allclose(quantized.dequantize(), expected, rtol=0, atol=digits)
    again = quantized.pack()
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[k], tensors[k]) for k in tensors)
