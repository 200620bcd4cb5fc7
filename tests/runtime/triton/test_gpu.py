"""`make test-gpu`: one sentence where there is no GPU, otherwise tests and a table of times."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import torch

import gpu

LINE = {"format": "uniform", "bits": 4, "shape": [4096, 11008], "right": True}
SPEED = {"fraction_of_bandwidth": 0.81, "speedup_vs_torch_bf16": 3.24}
REPORT = {"device": "A GPU", "torch": "2.13", "bandwidth_GBps": 4000.2, "kernels": [LINE | SPEED]}


def test_without_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 0
    assert capsys.readouterr().out.count("There is no GPU") == 1


def run_with(monkeypatch, *results):
    """Run with a GPU that answers with (exit status, output), tests first; None is a run without end."""
    answers = iter(results)

    def answer(command, **options):
        assert command[0] == sys.executable
        found = next(answers)
        if found is None:
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return SimpleNamespace(returncode=found[0], stdout=found[1])

    monkeypatch.setattr(gpu, "missing", lambda: None)
    monkeypatch.setattr(gpu.subprocess, "run", answer)
    return gpu.main()


def test_times(monkeypatch, capsys):
    assert run_with(monkeypatch, (0, None), (0, json.dumps(REPORT))) == 0
    title, line = capsys.readouterr().out.splitlines()
    assert title == "A GPU, torch 2.13, 4000 GB/s"
    assert line.split() == ["uniform", "4", "bits", "4096x11008", "81%", "of", "bandwidth,", "3.2", "x", "torch"]


def test_failures(monkeypatch, capsys):
    wrong = REPORT | {"kernels": [LINE | {"right": False}]}
    assert run_with(monkeypatch, (0, None), (1, json.dumps(wrong))) == 1
    assert "WRONG" in capsys.readouterr().out
    assert run_with(monkeypatch, (2, None), (0, "")) == 2
    assert run_with(monkeypatch, (0, None), None) == 1
