"""No bad argument of a public function ends in anything but one sentence."""

from __future__ import annotations

import inspect
import os
import shutil
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bitmill
from bitmill.data.benchmark_tasks import Item
from bitmill.errors import BitmillError
from bitmill.workflows import prepared_tasks
from bitmill.workflows.comparison import run
from bitmill.workflows.plan.plan import plan
from bitmill.workflows.sweep.run import sweep
from helpers.comparisons import in_this_process
from helpers.hostile import VALUES
from helpers.tiny_models import tiny_model

EXAMPLES = int(os.environ.get("BITMILL_HOSTILE_EXAMPLES", "8"))  # of every function
FUNCTIONS = [value for name in bitmill.__all__ if inspect.isfunction(value := getattr(bitmill, name))]
DATA = bitmill.CalibrationData("text.txt", samples=2, seqlen=16)
SOUND: dict[str, dict[str, Any]] = {  # arguments of a call that succeeds
    "quantize": {"model": "source", "method": "rtn", "out": "out", "calib": DATA, "measure": 1},
    "estimate": {"model": "source", "method": "rtn", "calib": DATA, "measure": 1},
    "evaluate": {"model": "done", "text": "text.txt", "seqlen": 16, "windows": 1},
    "evaluate_tasks": {"model": "done", "tasks": ["arc_easy"], "limit": 1},
    "export": {"folder": "done", "to": "dense", "out": "out"},
    "import_checkpoint": {"source": "exported", "out": "out"},
    "lint": {"model": "exported", "engine": "vllm"},
    "load": {"model": "done"},
    "load_tokenizer": {"model": "done"},
    "compare": {
        "model": "source", "methods": ["rtn"], "bits": [4], "out": "grid", "calib": DATA, "windows": 1,
        "prompts": ["w1"], "max_new_tokens": 1,
    },
    "sweep": {"model": "source", "text": "text.txt", "windows": 1, "seqlen": 16},
    "plan": {"model": "source"},
    "train": {"folder": "done", "teacher": "source", "out": "out", "calib": DATA, "held_apart": 1, "tokens": 16},
    "prepare_qat": {"model": tiny_model("llama"), "method": "rtn"},
    "set_qat_temperature": {"model": bitmill.prepare_qat(tiny_model("llama"), "rtn"), "temperature": 0.5},
    "convert_qat": {"model": bitmill.prepare_qat(tiny_model("llama"), "rtn"), "out": "out"},
}  # fmt: skip
UNCHECKED = {"progress", "tokenizer", "options", "weights"}  # objects with methods, and options of methods


@pytest.mark.parametrize("function", [*FUNCTIONS, plan, sweep], ids=lambda function: function.__name__)
def test_functions(function, pristine, tmp_path, monkeypatch):
    monkeypatch.setattr(run.run_grid, "__kwdefaults__", {**run.run_grid.__kwdefaults__, "run": in_this_process})
    monkeypatch.setattr(prepared_tasks, "load_items", lambda task, limit: [Item((("w1", " w2"),), 0)])
    monkeypatch.setattr(prepared_tasks, "require_lm_eval", lambda: None)
    monkeypatch.setattr(prepared_tasks, "log_likelihoods", lambda *_: [(-1.0, True)])
    if function in (bitmill.import_checkpoint, bitmill.lint) and not (pristine / "exported").exists():
        bitmill.export(pristine / "done", "compressed-tensors", pristine / "exported")
    here = tmp_path / "here"
    sound = SOUND[function.__name__]
    names = [name for name in inspect.signature(function).parameters if name not in UNCHECKED]

    @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(st.sampled_from(names), st.sampled_from(VALUES), min_size=1, max_size=2))
    def check(hostile: dict[str, Any]) -> None:
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(pristine, here, ignore=shutil.ignore_patterns("pipe"))
        os.mkfifo(here / "pipe")
        monkeypatch.chdir(here)
        try:
            function(**{**sound, **hostile})
        except BitmillError as error:
            message = str(error)
            assert message.endswith((".", "...")), message
            assert "\n" not in message
            assert len(message) < 2000

    check()
