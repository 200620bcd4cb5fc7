"""The Fisher diagonal, computed block by block, equals autograd on the whole model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import bitmill
from bitmill.calibration import fisher as module
from bitmill.calibration.fisher import Fisher, rescale_fisher
from bitmill.errors import NumericsError, OutputError
from bitmill.formats.codebook import Codebook
from bitmill.models.streamed import StreamedModel
from bitmill.progress import Progress
from bitmill.recipes.recipe import Recipe
from bitmill.recipes.rules import Rule
from bitmill.solvers.nearest import Nearest
from bitmill.sources.module import ModuleSource
from bitmill.tasks.base import task_for
from bitmill.transforms.equalize import Equalize
from helpers.tiny_models import TEXT_ADAPTERS, tiny_model

WINDOWS = torch.randint(3, 128, (3, 16), generator=torch.Generator().manual_seed(7))


def by_autograd(model: nn.Module, windows: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
    """Mean of squared gradients, one window at a time."""
    total: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for window in windows:
        model.zero_grad()
        if not task_for(model.config).generates:
            embedding = nn.functional.normalize(model(window[None]).last_hidden_state.mean(1), dim=-1)[0]
            (embedding @ torch.randn(len(embedding), generator=generator)).backward()
        else:
            model(window[None], labels=window[None]).loss.backward()
        for name in names:
            gradient = model.get_submodule(name).weight.grad
            gradient = gradient if isinstance(model.get_submodule(name), nn.Linear) else gradient.T
            total[name] = total.get(name, 0) + gradient.square() / len(windows)
    return total


def measured(model: nn.Module, folder, windows: torch.Tensor = WINDOWS) -> tuple[StreamedModel, Fisher]:
    streamed, fisher = StreamedModel(ModuleSource(model)), Fisher(folder)
    with torch.no_grad():
        fisher.measure(streamed, windows, Progress())
    return streamed, fisher


@pytest.mark.parametrize("name", TEXT_ADAPTERS)
def test_equals_autograd(name, tmp_path):
    model = tiny_model(name)
    streamed, fisher = measured(model, tmp_path)
    for index in range(len(streamed.blocks)):
        found = fisher.block(index)
        assert sorted(found) == sorted(streamed.adapter.linears)
        prefix = streamed.block_name(index)
        expected = by_autograd(model, WINDOWS, [f"{prefix}.{linear}" for linear in found])
        for linear, F in found.items():
            E = expected[f"{prefix}.{linear}"]
            assert F.shape == E.shape
            assert torch.allclose(F, E, rtol=1e-3, atol=1e-5 * float(E.max())), f"{prefix}.{linear}"


def test_no_side_effects(tmp_path):
    model, folders = tiny_model("llama"), [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
        measured(model, folder)
    files = [sorted(f.name for f in folder.iterdir()) for folder in folders]
    assert files[0] == files[1] == ["fisher-00000.safetensors", "fisher-00001.safetensors"]
    for file in files[0]:
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()


def test_scratch_files_not_flushed(tmp_path, monkeypatch):
    """Only results are written to the disk: each is flushed, and its name."""
    flushed: list[int] = []
    monkeypatch.setattr("bitmill.files.os.fsync", flushed.append)
    streamed, _ = measured(tiny_model("llama"), tmp_path)
    assert len(flushed) == 2 * len(streamed.blocks)


def test_window_count(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WINDOWS", 2)
    model = tiny_model("llama")
    streamed, fisher = measured(model, tmp_path)
    name = f"{streamed.block_name(0)}.mlp.up_proj"
    expected = by_autograd(model, WINDOWS[:2], [name])[name]
    assert torch.allclose(fisher.block(0)["mlp.up_proj"], expected, rtol=1e-3, atol=1e-5 * float(expected.max()))


def test_nonfinite_loss_refused(tmp_path):
    model = tiny_model("llama")
    model.lm_head.weight.data[:] = 3e38
    with pytest.raises(NumericsError, match="loss"):
        measured(model, tmp_path)


def test_scaled_weights(tmp_path):
    model = tiny_model("llama")
    _, fisher = measured(model, tmp_path)
    block = model.model.layers[0]
    scale = torch.rand(32) + 0.5
    before = block.mlp.up_proj.weight.detach().clone()
    with torch.no_grad():
        block.post_attention_layernorm.weight.div_(scale)
        for linear in (block.mlp.gate_proj, block.mlp.up_proj):
            linear.weight.mul_(scale)
    found = rescale_fisher(fisher.block(0)["mlp.up_proj"], before, block.mlp.up_proj.weight.detach())
    expected = by_autograd(model, WINDOWS, ["model.layers.0.mlp.up_proj"])["model.layers.0.mlp.up_proj"]
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-5 * float(expected.max()))


def recipe(weighted: str, transforms: tuple = ()) -> Recipe:
    return Recipe("test", Codebook(3), Nearest(True, weighted), transforms, (Rule("*.o_proj", "float"),))


@pytest.mark.parametrize("propagate", ["quantized", "float"])
@pytest.mark.parametrize("transforms", [(), (Equalize(),)], ids=["plain", "scaled"])
def test_pipeline_passes_fisher(propagate, transforms, tmp_path):
    model = tiny_model("llama")
    expected = by_autograd(model, WINDOWS, [n for n, m in model.named_modules() if isinstance(m, nn.Linear)])
    seen = {}

    def solve(self, W, stats, format):
        seen[len(seen)] = (W, stats)
        return usual(self, W, stats, format)

    usual = Nearest.solve
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Nearest, "solve", solve)
        bitmill.quantize(model, recipe("fisher", transforms), calib=WINDOWS, measure=0, propagate=propagate)
    assert all(stats.gram is None for _, stats in seen.values())  # nobody asked
    W, stats = seen[0]  # q, k and v, stacked
    target = torch.cat([expected[f"model.layers.0.self_attn.{n}_proj"] for n in "qkv"])
    assert stats.fisher.shape == W.shape == target.shape
    if not transforms:
        assert torch.allclose(stats.fisher, target, rtol=1e-3, atol=1e-5 * float(target.max()))
    assert len(seen) == 2 * 3


def test_cached_result_reused(tmp_path, monkeypatch):
    options = {"calib": WINDOWS, "measure": 0, "propagate": "float", "statistics": tmp_path / "shared"}
    bitmill.quantize(tiny_model("llama"), recipe("fisher"), out=tmp_path / "one", **options)
    monkeypatch.setattr(Fisher, "measure", None)
    bitmill.quantize(tiny_model("llama"), recipe("fisher"), out=tmp_path / "other", **options)
    files = [f.name for f in (tmp_path / "one").iterdir()]
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "other" / f).read_bytes() for f in files)


def test_disk_full_message(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OutputError, match="free some space"):
        measured(tiny_model("llama"), tmp_path)
