"""Weights in the files of other programs are read as those programs mean them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers"
GROUP = 32


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(PEERS), *sys.path])
    import quantized_weights

    return quantized_weights


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack the rows of codes (rows, n) into int32, the first code in the lowest bits."""
    rows = []
    for row in codes.tolist():
        stream = sum(code << (bits * i) for i, code in enumerate(row))
        words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(len(row) * bits // 32)]
        rows.append([word - (1 << 32) if word >> 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("sorted_groups", [True, False])
def test_format_of_autogptq(weights: Any, tmp_path: Path, bits: int, sorted_groups: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    outputs, inputs = 32, 96
    codes = torch.randint(0, 1 << bits, (outputs, inputs), generator=generator)
    zeros = torch.randint(0, 1 << bits, (inputs // GROUP, outputs), generator=generator)
    scales = torch.rand((inputs // GROUP, outputs), generator=generator).half()
    groups = torch.arange(inputs) // GROUP
    if not sorted_groups:
        groups = groups.flip(0)
    layer = "model.layers.0.mlp.up_proj"
    tensors = {
        "qweight": _packed(codes, bits).T.contiguous(),
        "qzeros": _packed((zeros - 1) % (1 << bits), bits),
        "scales": scales,
        "g_idx": groups.int(),
    }
    save_file({f"{layer}.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    config = {"quantization_config": {"bits": bits, "group_size": GROUP}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")

    dense, stored = weights.read_gptq(tmp_path)

    expected = (codes - zeros.T[:, groups]) * scales.float().T[:, groups]
    assert torch.equal(dense[f"{layer}.weight"], expected)
    order = 0 if sorted_groups else 32 * inputs
    assert stored == bits * codes.numel() + (bits + 16) * zeros.numel() + order


def test_stored_parts_count_and_dense_weights_do_not(weights: Any, tmp_path: Path) -> None:
    dense = torch.rand(4, 8)
    save_file(
        {"a.weight": dense, "a.stored.codes": torch.zeros(4, dtype=torch.uint8)}, tmp_path / "dense.safetensors"
    )

    found, stored = weights.read_dense(tmp_path)

    assert stored == 32
    assert torch.equal(found["a.weight"], dense)
