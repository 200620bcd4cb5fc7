"""The Fisher diagonal, block by block, equals the one that autograd takes of the whole model."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model
from torch import nn

from bitmill.errors import NumericsError
from bitmill.models.adapter import ADAPTERS
from bitmill.models.module import ModuleSource
from bitmill.models.skeleton import Skeleton
from bitmill.pipeline import fisher as module
from bitmill.pipeline.fisher import Fisher
from bitmill.progress import Progress

WINDOWS = torch.randint(3, 128, (3, 16), generator=torch.Generator().manual_seed(7))


def by_autograd(model: nn.Module, windows: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
    """Mean of squared gradients, one window at a time."""
    total: dict[str, torch.Tensor] = {}
    for window in windows:
        model.zero_grad()
        model(window[None], labels=window[None]).loss.backward()
        for name in names:
            gradient = model.get_submodule(name).weight.grad
            gradient = gradient if isinstance(model.get_submodule(name), nn.Linear) else gradient.T
            total[name] = total.get(name, 0) + gradient.square() / len(windows)
    return total


def measured(model: nn.Module, folder, windows: torch.Tensor = WINDOWS) -> tuple[Skeleton, Fisher]:
    skeleton, fisher = Skeleton(ModuleSource(model)), Fisher(folder)
    with torch.no_grad():
        fisher.measure(skeleton, windows, Progress())
    return skeleton, fisher


@pytest.mark.parametrize("name", ADAPTERS.names())
def test_it_equals_autograd(name, tmp_path):
    model = tiny_model(name)
    skeleton, fisher = measured(model, tmp_path)
    for index in range(len(skeleton.blocks)):
        found = fisher.block(index)
        assert sorted(found) == sorted(skeleton.adapter.linears)
        prefix = skeleton.block_name(index)
        expected = by_autograd(model, WINDOWS, [f"{prefix}.{linear}" for linear in found])
        for linear, F in found.items():
            E = expected[f"{prefix}.{linear}"]
            assert F.shape == E.shape
            assert torch.allclose(F, E, rtol=1e-3, atol=1e-5 * float(E.max())), f"{prefix}.{linear}"


def test_it_leaves_nothing_but_its_results_and_repeats_itself(tmp_path):
    model, folders = tiny_model("llama"), [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
        measured(model, folder)
    files = [sorted(f.name for f in folder.iterdir()) for folder in folders]
    assert files[0] == files[1] == ["fisher-0.safetensors", "fisher-1.safetensors"]
    for file in files[0]:
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()


def test_no_more_windows_are_read_than_it_says(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WINDOWS", 2)
    model = tiny_model("llama")
    skeleton, fisher = measured(model, tmp_path)
    name = f"{skeleton.block_name(0)}.mlp.up_proj"
    expected = by_autograd(model, WINDOWS[:2], [name])[name]
    assert torch.allclose(fisher.block(0)["mlp.up_proj"], expected, rtol=1e-3, atol=1e-5 * float(expected.max()))


def test_a_loss_that_is_not_finite_is_refused(tmp_path):
    model = tiny_model("llama")
    model.lm_head.weight.data[:] = 3e38
    with pytest.raises(NumericsError, match="loss"):
        measured(model, tmp_path)
