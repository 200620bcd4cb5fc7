"""A model that does not fit is refused in one sentence with both sizes, before its weights are read."""

from __future__ import annotations

import json

import psutil
import pytest
import torch

import bitmill
from bitmill.checkpoint.reader import open_checkpoint
from bitmill.cli.main import main
from bitmill.errors import NotEnoughMemoryError, is_out_of_memory
from bitmill.runtime.modules.packed import PackedMatrix
from bitmill.workflows.free_memory import check_fits, check_folder_fits
from helpers.tiny_models import tiny_model


@pytest.fixture
def folder(tmp_path):
    model = tiny_model("llama")
    bitmill.quantize(model, "rtn", bits=4, out=tmp_path / "packed", measure=0)
    return tmp_path / "packed"


def _free(monkeypatch, size_bytes: int) -> None:
    free = psutil.virtual_memory()._replace(available=size_bytes)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)


@pytest.mark.parametrize("dense", [False, True])
def test_a_folder_needs_what_its_model_holds(folder, dense, monkeypatch) -> None:
    model = bitmill.load(folder, dense=dense)
    held = {tensor.data_ptr(): tensor for tensor in model.parameters()}
    packed = [part for m in model.modules() if isinstance(m, PackedMatrix) for part in m.packed().values()]
    needed = sum(tensor.nbytes for tensor in [*held.values(), *packed])
    checkpoint = open_checkpoint(folder)
    _free(monkeypatch, needed)
    check_folder_fits(checkpoint, torch.float32, "cpu", dense)
    _free(monkeypatch, needed - 1)
    with pytest.raises(NotEnoughMemoryError, match="needs at least"):
        check_folder_fits(checkpoint, torch.float32, "cpu", dense)


@pytest.mark.parametrize("command", ["decode", "prefill"])
def test_commands_name_both_sizes(folder, command, monkeypatch, capsys) -> None:
    _free(monkeypatch, 1000)
    assert main(["bench", command, str(folder), "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["type"] == "NotEnoughMemoryError"
    assert "MB of memory and 0.0 MB are free" in error["message"]


def test_quantize_needs_a_block(monkeypatch, tmp_path) -> None:
    model = tiny_model("llama")
    _free(monkeypatch, 1000)
    with pytest.raises(NotEnoughMemoryError, match="largest block"):
        bitmill.quantize(model, "rtn", bits=4, out=tmp_path / "out", measure=0)


def test_other_devices_are_not_foreseen(monkeypatch) -> None:
    _free(monkeypatch, 0)
    check_fits("It", 1, "cuda")
    with pytest.raises(NotEnoughMemoryError) as refused:
        check_fits("It", 1, "cpu")
    assert is_out_of_memory(refused.value)
