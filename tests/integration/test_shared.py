"""Shared parameters of layers: learned once, stored once, loaded, and kept by tuners."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import bitmill
from bitmill.api import stored_bits
from bitmill.checkpoint.reader import open_checkpoint
from bitmill.checkpoint.verify import verify
from bitmill.errors import CheckpointError
from bitmill.formats.quantized import SHARED
from bitmill.models.block_call import output_fn
from bitmill.models.streamed import StreamedModel
from bitmill.recipes.method import build_recipe
from bitmill.report.describe import block_layer_bytes, part_sizes
from bitmill.runtime.modules.linear import QuantLinear
from bitmill.solvers.learning import CodebookLearner
from bitmill.tasks.base import task_for
from helpers.selection import thin
from helpers.tiny_models import tiny_model
from helpers.workspace import interrupted_after

MODELS = thin(["llama", "opt", "gpt2", "gemma2"], ["llama", "gpt2"])
WINDOWS = torch.randint(3, 128, (6, 16), generator=torch.Generator().manual_seed(7))
SMALL = {"shared": True, "codebook_bits": 4, "rounds": 2, "sweeps": 1, "epochs": 1}
every_model = pytest.mark.parametrize("name", MODELS)


def quantize(model: nn.Module, out=None, **options):
    given = {**SMALL, **options}
    return bitmill.quantize(model, given.pop("method", "aqlm"), calib=WINDOWS, out=out, measure=0, **given)


@torch.no_grad()
def answer(model: nn.Module) -> torch.Tensor:
    return output_fn(model)(WINDOWS[:2])


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@every_model
def test_stored_and_counted_once(name, tmp_path):
    outcome = quantize(tiny_model(name), tmp_path / "out")
    checkpoint, tensors = open_checkpoint(tmp_path / "out"), tensors_of(tmp_path / "out")
    kinds = {re.split(r"\.\d+\.", layer)[1] for layer in checkpoint.formats}
    books = {n for n in tensors if n.endswith(".codebooks")}
    assert {n.removeprefix(f"{SHARED}.") for n in books} == {f"{kind}.codebooks" for kind in kinds}
    assert all(tensors[n].dtype == torch.float16 and tensors[n].shape == (1, 1, 4, 16, 8) for n in books)
    packed = [n for n in tensors if n in books or (n.rpartition(".")[0] in checkpoint.formats and "bias" not in n)]
    bits = 8 * sum(tensors[n].nbytes for n in packed)
    weights = sum(rows * columns for rows, columns in checkpoint.shapes.values())
    assert outcome.summary["bits_per_weight"] == checkpoint.bits_per_weight == bits / weights
    assert outcome.report["bits_per_weight"] == bits / weights
    own = sum(layer["size_bytes"] for layer in outcome.report["layers"])
    assert 8 * (own + sum(tensors[n].nbytes for n in books)) == bits
    listed = {entry["name"]: entry["size_bytes"] for entry in checkpoint.layers()}
    assert sum(listed.values()) == sum(t.nbytes for t in tensors.values())
    live = bitmill.load(tmp_path / "out")
    assert stored_bits(live, False)[0] == bits / weights
    assert verify(checkpoint)["layers"] == len(checkpoint.formats)


@every_model
def test_all_loaders_agree(name, tmp_path):
    model = tiny_model(name)
    quantize(model, tmp_path / "out")
    ours = bitmill.load(tmp_path / "out")
    expected = answer(ours)
    theirs = task_for(model.config).auto_class.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert torch.equal(answer(theirs), expected)
    theirs.save_pretrained(tmp_path / "again")
    again = task_for(model.config).auto_class.from_pretrained(tmp_path / "again", dtype=torch.float32).eval()
    assert torch.equal(answer(again), expected)
    assert torch.equal(answer(copy.deepcopy(ours)), expected)
    half = bitmill.load(tmp_path / "out", dtype=torch.bfloat16)
    assert all(b.dtype == torch.float16 for n, b in half.named_buffers() if n.endswith(".codebooks"))
    dense = bitmill.load(tmp_path / "out", dense=True)
    assert torch.allclose(answer(dense), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert not any(SHARED in n for n in dense.state_dict())
    quantize(model)  # in place
    assert torch.equal(answer(model), expected)
    assert {id(m.shared.codebooks) for m in model.modules() if isinstance(m, QuantLinear)} == {
        id(b) for n, b in model.named_buffers() if n.endswith(".codebooks")
    }


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", thin(["llama", "gpt2"], ["llama"]))
def test_with_embedding_and_head(name, tied, tmp_path):
    model = tiny_model(name, tie_word_embeddings=tied)
    outcome = quantize(model, tmp_path / "out", head_bits=8)
    checkpoint, tensors = open_checkpoint(tmp_path / "out"), tensors_of(tmp_path / "out")
    assert {checkpoint.formats[n].name for n in checkpoint.outside if n in checkpoint.formats} == {"uniform"}
    alone = quantize(model, dry_run=True).summary
    assert outcome.summary["bits_per_weight"] == checkpoint.bits_per_weight == alone["bits_per_weight"]
    parts = dict(part_sizes(outcome.report))
    assert sum(parts.values()) == sum(t.nbytes for t in tensors.values())
    assert parts["in the blocks' linear layers"] == block_layer_bytes(outcome.report)
    assert parts["in token embeddings and head"] == outcome.summary["head_bytes"]
    packed = bitmill.load(tmp_path / "out")
    expected = answer(packed)
    assert stored_bits(packed, False)[0] == checkpoint.bits_per_weight
    packed.save_pretrained(tmp_path / "again")
    assert torch.equal(answer(task_for(model.config).auto_class.from_pretrained(tmp_path / "again")), expected)
    assert torch.equal(answer(copy.deepcopy(packed)), expected)
    dense = bitmill.load(tmp_path / "out", dense=True)
    assert torch.allclose(answer(dense), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert dense.state_dict().keys() == model.state_dict().keys()
    assert {n: type(m) for n, m in dense.named_modules()} == {n: type(m) for n, m in model.named_modules()}
    assert (dense.get_output_embeddings().weight is dense.get_input_embeddings().weight) == tied
    quantize(model, head_bits=8)  # in place
    assert torch.equal(answer(model), expected)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))


def test_fine_tuning_keeps_shared(tmp_path):
    for epochs in (0, 2):
        quantize(tiny_model("llama"), tmp_path / str(epochs), epochs=epochs)
    plain, tuned = tensors_of(tmp_path / "0"), tensors_of(tmp_path / "2")
    assert plain.keys() == tuned.keys()
    assert all(torch.equal(plain[n], tuned[n]) for n in plain if n.startswith(SHARED))
    moved = {n.rpartition(".")[2] for n in plain if not torch.equal(plain[n], tuned[n])}
    assert "scale" in moved


def test_one_block_in_memory(tmp_path, monkeypatch):
    load, add_layer = StreamedModel.load_block, CodebookLearner.add_layer
    loaded: list[int] = []
    skeletons: list[StreamedModel] = []

    def load_block(self, index):
        skeletons.append(self)
        return load(self, index)

    def look(self, W, stats):
        blocks = skeletons[-1].blocks
        loaded.append(sum(not any(p.is_meta for p in block.parameters()) for block in blocks))
        add_layer(self, W, stats)

    monkeypatch.setattr(StreamedModel, "load_block", load_block)
    monkeypatch.setattr(CodebookLearner, "add_layer", look)
    quantize(tiny_model("llama", num_hidden_layers=4), tmp_path / "out")
    assert loaded == [1] * (4 * 7)


def test_float_layers_not_learned_from(tmp_path):
    ignored = ["*.down_proj", "model.layers.0.*.gate_proj", "model.layers.0.*.up_proj"]
    recipe = bitmill.Recipe.from_dict({**build_recipe("aqlm", SMALL).to_dict(), "ignore": ignored})
    bitmill.quantize(tiny_model("llama"), recipe, calib=WINDOWS, out=tmp_path / "out", measure=0)
    books = [n for n in tensors_of(tmp_path / "out") if n.startswith(SHARED)]
    assert len(books) == 6
    assert answer(bitmill.load(tmp_path / "out")).isfinite().all()


def interrupted(folder, monkeypatch, after: int, **options) -> None:
    """A run that is stopped when it has written `after` blocks."""
    with monkeypatch.context() as patch:
        interrupted_after(after, patch)
        with pytest.raises(KeyboardInterrupt):
            quantize(tiny_model("llama"), folder, **options)


@pytest.mark.parametrize(
    ("after", "head_bits"), thin([(0, None), (1, None), (-1, 8), (0, 8), (1, 8)], [(1, None), (0, 8)])
)
def test_resumed_run_keeps_shared(after, head_bits, tmp_path, monkeypatch):
    quantize(tiny_model("llama"), tmp_path / "whole", head_bits=head_bits)
    interrupted(tmp_path / "out", monkeypatch, after, head_bits=head_bits)
    monkeypatch.setattr(CodebookLearner, "add_layer", None)  # learning must not run again
    quantize(tiny_model("llama"), tmp_path / "out", resume=True, head_bits=head_bits)
    files = sorted(f.name for f in (tmp_path / "whole").iterdir())
    assert files == sorted(f.name for f in (tmp_path / "out").iterdir())
    for file in files:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


def test_damage_refused(tmp_path, monkeypatch):
    interrupted(tmp_path / "half", monkeypatch, 1)
    (last,) = (tmp_path / "half.partial" / "model").glob("*-00004-of-00004.safetensors")
    save_file({n: t + 1 for n, t in load_file(last).items()}, last)
    with pytest.raises(CheckpointError, match="altered"):
        quantize(tiny_model("llama"), tmp_path / "half", resume=True)

    out = tmp_path / "out"
    quantize(tiny_model("llama"), out)
    config = json.loads((out / "config.json").read_text())
    for place in ("model.layers.0", 3, "shared_parts", "shared_parts.elsewhere", "shared_parts."):
        damaged = copy.deepcopy(config)
        damaged["quantization_config"]["groups"][0]["shared"] = place
        (out / "config.json").write_text(json.dumps(damaged))
        with pytest.raises(CheckpointError) as caught:
            bitmill.load(out)
        assert "\n" not in str(caught.value)
    (out / "config.json").write_text(json.dumps(config))
    file = next(f for f in out.glob("*.safetensors") if any(SHARED in n for n in names(f)))
    tensors = {n: t for n, t in load_file(file).items() if "q_proj" not in n}
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"q_proj\.codebooks"):
        bitmill.load(out)


def names(file) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def test_unshared_by_default(tmp_path):
    quantize(tiny_model("llama"), tmp_path / "out", shared=False)
    text = (tmp_path / "out" / "config.json").read_text() + (tmp_path / "out" / "report.json").read_text()
    assert "shared" not in text
    assert not any(SHARED in n for n in tensors_of(tmp_path / "out"))
