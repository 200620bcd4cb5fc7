"""The plan of a comparison, and the process of a cell."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from bitmill.errors import CheckpointError, OutputError, RecipeError, UsageError
from bitmill.evaluation.metrics import score_windows
from bitmill.progress import Progress
from bitmill.recipes.method import METHODS, build_recipe
from bitmill.workflows.comparison import process
from bitmill.workflows.comparison.grid import Grid, VariantSpec, plan_variants
from bitmill.workflows.comparison.predictions import PredictionRecorder, RecordedPredictions
from bitmill.workflows.comparison.process import VariantFailed, run_variant


def test_cells_of_grid():
    cells = plan_variants(["rtn", "gptq"], [3, 4], options={"gptq": {"damp": "0.05"}})
    assert [cell.name for cell in cells] == ["rtn-3bit", "rtn-4bit", "gptq-3bit", "gptq-4bit"]
    assert [cell.bits for cell in cells] == [3, 4, 3, 4]
    assert cells[3].recipe["weight"]["bits"] == 4
    assert cells[3].recipe["solver"]["damp"] == 0.05
    assert all(cell.reason is None for cell in cells)


def test_unsupported_bits():
    cells = plan_variants(["gptqt", "rtn"], [8])
    assert cells[0].recipe is None
    assert "1 to 4 bits, not 8" in cells[0].reason
    assert cells[1].recipe
    with pytest.raises(RecipeError, match="--bits has 9, which none of the methods has"):
        plan_variants(["gptqt", "rtn"], [3, 9])


def test_options_for_given_bits():
    methods = ["gptqt", "rtn"]
    two, three, *_ = plan_variants(methods, [2, 3], options={"gptqt": {"grid_bits": 6}})  # 3 bits are its default
    assert two.recipe["weight"]["grid_bits"] == 6
    assert three.recipe is None
    assert "grid_bits is 6" in three.reason


@pytest.mark.parametrize("method", METHODS.names())
def test_methods_can_be_compared(method):
    cells = plan_variants([method], [3, 4])
    assert len(cells) == (2 if "bits" in METHODS.get(method).__dataclass_fields__ else 1)
    assert all((cell.recipe is None) == bool(cell.reason) for cell in cells)
    assert any(cell.recipe for cell in cells)


def test_recipe_file_cell(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(build_recipe("gptq", {"bits": 2}).to_yaml().replace("name: gptq", "name: my gptq!"))
    (cell,) = plan_variants([], [], [path])
    assert (cell.name, cell.method, cell.bits) == ("my-gptq", "my gptq!", 2)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((["nonsense"], [3]), None, "no method 'nonsense'"),
        ((["rtn"], []), None, "--bits"),
        ((["rtn", "rtn"], [3]), None, "twice"),
        ((["rtn"], [3, 3]), None, "twice"),
        ((["rtn"], [3]), {"gptq": {"damp": 1}}, "not among the methods"),
        ((["gptq"], [3]), {"gptq": {"dampness": 1}}, "no option 'dampness'"),
        ((["gptq"], [3]), {"gptq": {"damp": "much"}}, "use a number"),
        ((["gptq"], [3]), {"gptq": {"bits": 3}}, "--bits"),
    ],
)
def test_invalid_options_refused(arguments, options, message):
    with pytest.raises(
        RecipeError if "option" in message or "use a number" in message else UsageError, match=message
    ):
        plan_variants(*arguments, options=options)


def test_grid_round_trip():
    grid = Grid("model", plan_variants(["rtn", "nf4"], [3, 8]), windows=3, prompts=("a", "b"))
    assert Grid.from_dict(json.loads(json.dumps(grid.to_dict()))) == grid


@pytest.mark.parametrize(
    ("cells", "windows", "message"),
    [
        ((), 1, "nothing to compare"),
        ((VariantSpec("a", "a", 3, {}), VariantSpec("a", "a", 3, {})), 1, "Two variants"),
        ((VariantSpec("float", "float", 3, {}),), 1, "cannot be called"),
        ((VariantSpec("a", "a", 3, {}),), 0, "at least 1"),
    ],
)
def test_invalid_grids(cells, windows, message):
    with pytest.raises(UsageError, match=message):
        Grid("model", cells, windows=windows)


# -- the float model's predictions --------------------------------------------------------------------------


def test_recorded_predictions(tmp_path):
    torch.manual_seed(0)
    windows = torch.randint(0, 50, (5, 40))
    table, noise = 4 * torch.randn(50, 50), 0.02 * torch.randn(50, 50)

    def exact(tokens):
        return table[tokens] + 30  # far from 0, where fp16 is coarse

    def model(tokens):
        return (table + noise)[tokens] + 30

    recorder = PredictionRecorder(tmp_path / "float.npy", exact, windows)
    row = score_windows(recorder, windows, batch=2)
    recorder.finish()
    direct = score_windows(model, windows, exact)
    recorded = score_windows(model, windows, RecordedPredictions(tmp_path / "float.npy", windows), batch=3)
    assert row["perplexity"] == pytest.approx(direct["reference_perplexity"])
    assert recorded["kl_divergence"] == pytest.approx(direct["kl_divergence"], rel=1e-2)
    assert recorded["kl_divergence"] < 1e-3
    assert recorded["top1_agreement"] == direct["top1_agreement"]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["float.npy", "float.npy.xxh3"]


def test_other_windows_refused(tmp_path):
    windows = torch.zeros(2, 4, dtype=torch.int64)
    recorder = PredictionRecorder(tmp_path / "float.npy", lambda tokens: torch.zeros(*tokens.shape, 3), windows)
    score_windows(recorder, windows)
    recorder.finish()
    with pytest.raises(CheckpointError, match="windows"):
        RecordedPredictions(tmp_path / "float.npy", windows[:1])
    content = bytearray((tmp_path / "float.npy").read_bytes())
    content[-2] ^= 1
    (tmp_path / "float.npy").write_bytes(content)
    with pytest.raises(CheckpointError, match="its digest differs"):
        RecordedPredictions(tmp_path / "float.npy", windows)
    (tmp_path / "float.npy.xxh3").unlink()  # of an earlier version
    RecordedPredictions(tmp_path / "float.npy", windows)
    (tmp_path / "float.npy").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="cannot be read"):
        RecordedPredictions(tmp_path / "float.npy", windows)


def test_predictions_disk_full(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    windows = torch.zeros(2, 4, dtype=torch.int64)
    recorder = PredictionRecorder(tmp_path / "float.npy", lambda tokens: torch.zeros(*tokens.shape, 3), windows)
    with pytest.raises(OutputError, match="lower --windows"):
        score_windows(recorder, windows)


# -- the process of a cell ----------------------------------------------------------------------------------


class Noted(Progress):
    def __init__(self):
        self.tasks, self.steps = [], 0

    def start(self, task, total):
        self.tasks.append((task, total))

    def advance(self, steps=1):
        self.steps += steps

    def note_memory(self, size_bytes):
        self.memory = size_bytes


@pytest.fixture
def cell(tmp_path, monkeypatch):
    """Run a program in place of a worker."""

    def run(program: str, progress: Progress | None = None) -> dict:
        monkeypatch.setattr(process, "WORKER", (sys.executable, "-c", program))
        return run_variant(tmp_path, "gptq-3bit", tmp_path / "gptq-3bit.log", progress or Progress())

    return run


def test_result_and_progress(cell, tmp_path):
    noted = Noted()
    program = """
print('{"task": "quantize", "total": 2}')
print('{"steps": 1, "memory": 123}')
print("a library speaks")
print('[1, 2]')
print('{"task": null}')
print('{"result": {"perplexity": 2.5}}')
"""
    assert cell(program, noted) == {"perplexity": 2.5}
    assert noted.tasks == [("gptq-3bit: quantize", 2)]
    assert (noted.steps, noted.memory) == (1, 123)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ('print(\'{"failed": "It cannot be."}\'); raise SystemExit(1)', "It cannot be."),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ran out of memory"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGABRT)", "died of SIGABRT"),
        ("raise SystemExit(3)", "status 3 and without a result"),
    ],
)
def test_failed_process(cell, tmp_path, program, reason):
    with pytest.raises(VariantFailed, match=reason):
        cell(program)
    assert list(tmp_path.iterdir()) == []


def test_failed_process_stderr(cell, tmp_path):
    with pytest.raises(VariantFailed, match=r"see gptq-3bit\.log"):
        cell("raise ValueError('of all things')")
    assert "of all things" in (tmp_path / "gptq-3bit.log").read_text()


def test_worker_ends_with_parent():
    program = (
        "import sys, threading, time\n"
        "from bitmill.workflows.comparison.process import exit_with_parent\n"
        "threading.Thread(target=exit_with_parent, args=(sys.stdin,), daemon=True).start()\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"ready\n"
    child.stdin.close()
    assert child.wait(30) == 1
    child.stdout.close()


def test_interrupt_ends_workers(cell, tmp_path):
    class Impatient(Progress):
        def start(self, task, total):
            raise KeyboardInterrupt

    program = f"""
import os, pathlib, time
pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))
print('{{"task": "quantize", "total": 2}}', flush=True)
time.sleep(60)
"""
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        cell(program, Impatient())
    assert time.monotonic() - started < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
