"""The record of a packed model as it runs."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitmill
from bitmill.checkpoint.reader import open_checkpoint
from bitmill.errors import CheckpointError
from bitmill.evaluation import reference
from bitmill.evaluation.reference import FILE
from bitmill.files import file_record
from bitmill.workflows import running
from bitmill.workflows.running import PATHS, verify_running
from helpers.workspace import save_model, write_text


@pytest.fixture(autouse=True, scope="module")
def _all_tokens():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(reference, "TOKENS", 512)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("running")
    calibration = bitmill.CalibrationData(str(write_text(root / "text.txt")), 4, 32)
    options = {"bits": 3, "group_size": 16, "calib": calibration, "measure": 2}
    return bitmill.quantize(
        save_model(root / "source"), "rtn", out=root / "out", kv="kivi", kv_options={"group": 8}, **options
    ).out


def again(checkpoint):
    return verify_running(checkpoint, bitmill.load(checkpoint.folder))


def test_record_agrees_with_the_measurement_of_decoded_weights(folder):
    report = json.loads((folder / "report.json").read_text())
    running, measured = report["running"], report["measured"][0]
    assert running["tokens"] == 64
    for path in PATHS:
        assert running[path]["kl_divergence"] == pytest.approx(measured["kl_divergence"], rel=0.1)
        assert running[path]["top1_agreement"] == pytest.approx(measured["top1_agreement"], abs=0.1)
    assert FILE in report["files"]
    assert again(open_checkpoint(folder)) == running


@pytest.mark.parametrize("path", PATHS)
def test_changed_figures_are_refused(folder, path):
    checkpoint = open_checkpoint(folder)
    recorded = checkpoint.report["running"]
    recorded[path]["kl_divergence"] *= 1.5
    with pytest.raises(CheckpointError, match=rf"gives kl_divergence .*\({path}\) where"):
        again(checkpoint)
    recorded[path]["kl_divergence"] = "0.1"
    with pytest.raises(CheckpointError, match="do not describe one measurement"):
        again(checkpoint)
    del checkpoint.report["running"]
    with pytest.raises(CheckpointError, match="do not describe one measurement"):
        again(checkpoint)


def test_changed_predictions_are_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "out")
    kept, report = load_file(copy / FILE), json.loads((copy / "report.json").read_text())
    save_file({**kept, "log_probabilities": kept["log_probabilities"].roll(1, 0)}, copy / FILE, {"format": "pt"})
    with pytest.raises(CheckpointError, match="was altered since it was written"):
        again(open_checkpoint(copy))
    report["files"][FILE] = file_record(copy / FILE)
    (copy / "report.json").write_text(json.dumps(report))
    with pytest.raises(CheckpointError, match="gives"):
        again(open_checkpoint(copy))


def test_nothing_is_recorded_where_the_packed_model_does_not_fit_into_memory(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "read_folder", lambda *args, **options: torch.empty(1 << 50))
    calibration = bitmill.CalibrationData(str(folder.parent / "text.txt"), 4, 32)
    source, out = folder.parent / "source", tmp_path / "out"
    report = bitmill.quantize(source, "rtn", bits=3, group_size=16, out=out, calib=calibration).report
    monkeypatch.undo()
    assert "running" not in report
    assert report["measured"]
    assert again(open_checkpoint(out)) is None


def test_nothing_is_recorded_without_held_out_windows(tmp_path):
    out = bitmill.quantize(
        save_model(tmp_path / "source"), "rtn", bits=4, group_size=16, out=tmp_path / "out", measure=0
    ).out
    assert not (out / FILE).exists()
    assert again(open_checkpoint(out)) is None
    assert torch.isfinite(bitmill.load(out)(torch.tensor([[3, 4]])).logits).all()
