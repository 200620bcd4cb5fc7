"""Every loader refuses packed tensors that no encoder writes; `verify` runs what it decodes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import bitmill
from bitmill.checkpoint.reader import open_checkpoint
from bitmill.checkpoint.verify import verify
from bitmill.errors import CheckpointError
from bitmill.files import file_record
from bitmill.formats.binary_coding import BinaryCoding
from bitmill.formats.codebook import Codebook
from bitmill.formats.pyramid import Pyramid
from bitmill.formats.sum import Sum
from bitmill.formats.uniform import Uniform
from bitmill.recipes.recipe import Recipe
from bitmill.runtime.kernels import lut_tables
from bitmill.solvers.nearest import Nearest
from helpers.tiny_models import tiny_model

LAYER = "model.layers.0.self_attn.k_proj"


def written(format, out: Path, change: Callable[[torch.nn.Module], None] | None = None) -> Path:
    model = tiny_model("llama")
    if change:
        change(model)
    bitmill.quantize(model, Recipe("test", format, Nearest()), out=out, measure=0)
    return out


def damage(folder: Path, part: str, change: Callable[[Tensor], None]) -> None:
    """Change a tensor of LAYER, and what the record says of its file."""
    shard = next(path for path in folder.glob("*.safetensors") if f"{LAYER}.{part}" in load_file(path))
    tensors = load_file(shard)
    change(tensors[f"{LAYER}.{part}"])
    save_file(tensors, shard, {"format": "pt"})
    report = json.loads((folder / "report.json").read_text())
    report["files"][shard.name] = file_record(shard)
    (folder / "report.json").write_text(json.dumps(report))


def fill(value: float) -> Callable[[Tensor], None]:
    def change(tensor: Tensor) -> None:
        tensor.view(-1)[-1] = value

    return change


@pytest.mark.parametrize(
    ("format", "part", "value", "reason"),
    [
        (Codebook(3), "table", float("nan"), "its table holds NaN or Inf"),
        (Uniform(4, 32), "scale", float("inf"), "its scale holds NaN or Inf"),
        (Pyramid(2), "codes", -1, "its codes hold numbers of no point"),
        (Sum(Uniform(4, 32), outliers=0.02), "sparse_columns", -1, "its sparse_columns are outside the matrix"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_loaders_name_the_damaged_layer(format, part, value, reason, tmp_path):
    folder = written(format, tmp_path / "out")
    verify(open_checkpoint(folder))
    damage(folder, part, fill(value))
    expected = f"The layer '{LAYER}' of .* is damaged: {reason}"
    for load in (
        bitmill.load,
        lambda path: bitmill.load(path, dense=True),
        AutoModelForCausalLM.from_pretrained,
        lambda path: open_checkpoint(path).quantized(LAYER),
        lambda path: verify(open_checkpoint(path)),
    ):
        with pytest.raises(CheckpointError, match=expected):
            load(folder)


def test_state_dict_names_the_damaged_layer(tmp_path):
    model = bitmill.load(written(Uniform(4, 32), tmp_path / "out"))
    state = model.state_dict()
    state[f"{LAYER}.scale"] = state[f"{LAYER}.scale"] * float("inf")
    with pytest.raises(RuntimeError, match=f"'{LAYER}' is damaged: its scale holds NaN or Inf"):
        model.load_state_dict(state)


def test_verify_compares_single_tokens(tmp_path, monkeypatch):
    """A kernel whose tables are wrong for few tokens is found, though all weights decode."""

    def zeros(model: torch.nn.Module) -> None:
        model.get_submodule(LAYER).weight.data[:3] = 0

    folder = written(BinaryCoding(4, 16), tmp_path / "out", zeros)
    monkeypatch.delenv("BITMILL_KERNEL")
    verify(open_checkpoint(folder))
    monkeypatch.setattr(lut_tables, "_half_steps", lambda step: torch.where(step > 0, step, torch.ones_like(step)))
    with pytest.raises(
        CheckpointError, match=f"'{LAYER}' does not run on cpu as it decodes: products of 1 token "
    ):
        verify(open_checkpoint(folder))
