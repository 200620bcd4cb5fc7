"""Files of a folder are memory-mapped, and unmapped once their codes are repacked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bitmill
from helpers.native_kernels import needs_native
from helpers.tiny_models import tiny_model

MAPS = Path("/proc/self/maps")
TOKENS = torch.randint(3, 128, (1, 8), generator=torch.Generator().manual_seed(8))


def mapped(folder: Path) -> set[str]:
    """Names of the folder's files that this process has in its memory."""
    lines = MAPS.read_text(encoding="utf-8").splitlines()
    return {Path(line.split()[-1]).name for line in lines if str(folder) in line}


@needs_native
@pytest.mark.skipif(not MAPS.exists(), reason="the system does not tell what is mapped")
@pytest.mark.parametrize(("method", "head_bits"), [("rtn", None), ("rtn", 8), ("bcq", 8), ("pvq", 8)])
@torch.no_grad()
def test_files_unmapped_after_use(method, head_bits, monkeypatch, tmp_path):
    monkeypatch.delenv("BITMILL_KERNEL", raising=False)
    out = tmp_path / "out"
    model = tiny_model("llama", tie_word_embeddings=True)
    bitmill.quantize(model, method, calib=TOKENS, out=out, measure=0, head_bits=head_bits)
    model = bitmill.load(out)
    expected = model.model.norm.weight.clone()
    before = mapped(out)
    assert len(before) == len(list(out.glob("*.safetensors")))
    model(TOKENS)
    assert len(mapped(out)) == (1 if head_bits is None else 0)  # the float table of embeddings
    assert torch.equal(model.model.norm.weight, expected)
