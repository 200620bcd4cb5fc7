"""Estimates: the size is that of the folder, costs add up, and nothing is written."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import bitmill
from bitmill.data.domain import SUITE, Document
from bitmill.errors import UsageError
from bitmill.files import folder_bytes
from bitmill.models.streamed import StreamedModel
from bitmill.progress import Progress
from bitmill.recipes.compose import compose
from bitmill.recipes.method import build_recipe
from bitmill.recipes.resolve import resolve_recipe
from bitmill.sources.module import ModuleSource
from bitmill.sources.safetensors_header import read_header
from bitmill.workflows import announce
from bitmill.workflows.cost import Cost
from bitmill.workflows.estimate import describe_duration
from bitmill.workflows.folder_size import file_size
from bitmill.workflows.probe import Trial, extrapolate, kinds_of
from helpers import tiny_domains
from helpers.tiny_models import tiny_model
from helpers.workspace import save_model

WINDOWS = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(0))


def test_size_of_folder(tmp_path) -> None:
    source = save_model(tmp_path / "source", blocks=3)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i * 7 % 50}" for i in range(2000)))
    options = {"calib": bitmill.CalibrationData(str(text), 4, 16), "measure": 1, "group_size": 16}
    before = sorted(tmp_path.rglob("*"))
    found = bitmill.estimate(source, "gptq", head_bits=8, **options)
    assert sorted(tmp_path.rglob("*")) == before
    outcome = bitmill.quantize(source, "gptq", out=tmp_path / "out", head_bits=8, **options)
    assert found.size_bytes == pytest.approx(
        folder_bytes(tmp_path / "out"), rel=1e-3
    )  # digits of measured numbers
    assert found.bits_per_weight == outcome.summary["bits_per_weight"]
    assert found.cpu_seconds > 0
    assert found.peak_memory_bytes > 1e8
    for file in (tmp_path / "out").glob("model-*"):
        layout = {name: (entry.shape, entry.dtype) for name, entry in read_header(file).items()}
        assert file_size(layout) == file.stat().st_size


def test_size_of_folder_measured_by_domain(tmp_path, monkeypatch) -> None:
    documents = [Document(f"{n}", f"w{n % 50} w{n * 7 % 50} " * 30) for n in range(40)]
    tiny_domains.install(monkeypatch, dict.fromkeys((*SUITE, "languages"), documents))
    source = save_model(tmp_path / "source", blocks=3)
    options = {"calib": bitmill.CalibrationData("mix", 4, 16), "group_size": 16}
    found = bitmill.estimate(source, "gptq", **options)
    outcome = bitmill.quantize(source, "gptq", out=tmp_path / "out", **options)
    assert found.size_bytes == pytest.approx(folder_bytes(outcome.out), rel=2e-3)


def test_live_module_is_unchanged() -> None:
    model = tiny_model("gpt2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    bitmill.estimate(model, "rtn", calib=WINDOWS, bits=4, group_size=16)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("limit", "words"), [(0.0, "of memory here"), (600.0, "blocks in about")])
def test_announced_before_a_run(limit, words, tmp_path, monkeypatch) -> None:
    notes: list[str] = []
    progress = Progress()
    progress.shown = True
    progress.note = notes.append
    monkeypatch.setattr(announce, "_WEIGHTS", 0)
    monkeypatch.setattr(announce, "_BLOCKS", 0)
    monkeypatch.setattr(announce, "_SHORT_S", limit)
    source = save_model(tmp_path / "source", blocks=2)
    bitmill.quantize(source, "rtn", out=tmp_path / "out", measure=0, group_size=16, progress=progress)
    assert [note for note in notes if words in note]


def test_method_none_is_refused() -> None:
    with pytest.raises(UsageError, match="nothing to estimate"):
        bitmill.estimate(tiny_model("llama"), "none")


def test_kinds_of_blocks() -> None:
    streamed = StreamedModel(ModuleSource(tiny_model("llama")))
    recipe = build_recipe("rtn", {"bits": 4, "group_size": 16})
    assert kinds_of(streamed, resolve_recipe(recipe, streamed)).like == (0,) * len(streamed.blocks)
    mixed = compose(recipe, rules=["*layers.1.mlp.*=uniform:bits=8,group_size=16"])
    kinds = kinds_of(streamed, resolve_recipe(mixed, streamed))
    assert kinds.probed == (0, 1)
    assert kinds.sum([Cost(1, 2), Cost(3, 4)]).seconds == 4 + (len(streamed.blocks) - 2)


def test_trials_are_extrapolated() -> None:
    first = Trial(4, Cost(1, 1), [Cost(2, 2)], 100)
    second = replace(first, windows=8, outside=Cost(2, 1), inside=[Cost(3, 2)], memory_bytes=110)
    found = extrapolate(first, second, 16)
    assert (found.outside, found.inside) == (Cost(4, 1), [Cost(5, 2)])
    assert found.memory_bytes == 130
    assert extrapolate(first, second, 8) is second


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "1 s"), (90, "90 s"), (900, "15 minutes"), (36000, "10.0 hours")]
)
def test_durations(seconds, words) -> None:
    assert describe_duration(seconds) == words
