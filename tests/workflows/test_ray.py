"""Tasks of a Ray cluster: results equal to the byte, also where a worker is killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

import bitmill
from bitmill.errors import UsageError
from bitmill.progress import Progress
from bitmill.workflows import ray_tasks
from bitmill.workflows.ray_tasks import tasks_on
from helpers.selection import FULL
from helpers.tiny_models import tiny_model
from helpers.workspace import save_model, write_text

RTN = {"methods": ["rtn"], "calib": bitmill.CalibrationData("text.txt", 10, 16, 0)}


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BITMILL_CACHE", str(tmp_path / "cache"))
    write_text(tmp_path / "text.txt")
    save_model(tmp_path / "model", blocks=4)
    return tmp_path


REFUSED = {
    "an address": ({"ray": "the moon"}, "use local"),
    "a live module": ({"ray": "local", "model": tiny_model("llama")}, "with Ray name a model or a folder"),
    "no budget": ({"ray": "local", "budget": None, "methods": None, "method": "rtn"}, "ray belongs to a budget"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, workspace):
    options, message = REFUSED[case]
    with pytest.raises(UsageError, match=message):
        bitmill.quantize(**{"model": "model", "budget": "4bpw", "dry_run": True, **RTN, **options})
    if case == "an address":
        with pytest.raises(UsageError, match=message):
            bitmill.compare("model", ["rtn"], [4], out="grid", ray="the moon")


def test_not_installed(monkeypatch):
    def missing(name):
        raise ImportError("No module named 'ray'")

    monkeypatch.setattr(ray_tasks, "import_module", missing)
    with pytest.raises(UsageError, match="pip install"), tasks_on("local", Progress()):
        pass


def test_without_a_cluster_calls_are_made_in_order():
    with tasks_on(None, Progress()) as tasks:
        assert list(tasks(pow, [(2, 3), (3, 2)])) == [(0, 8), (1, 9)]


@pytest.fixture(scope="module")
def cluster():
    """A local cluster of two workers."""
    if not FULL:
        pytest.skip("a cluster takes half a minute to start: make test-all")
    pytest.importorskip("ray", reason='needs pip install "bitmill[ray]"')
    ray = ray_tasks.import_ray()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


class Killer(threading.Thread):
    """Kills the first worker that is at a task."""

    killed = 0

    def run(self):
        deadline = time.monotonic() + 120
        while not self.killed and time.monotonic() < deadline:
            for child in psutil.Process().children(recursive=True):
                try:
                    words = child.cmdline()
                except psutil.Error:
                    continue
                if words and words[0].startswith("ray::_call"):
                    child.kill()
                    self.killed = child.pid
                    return
            time.sleep(0.05)


def test_lost_task_is_retried(cluster, tmp_path):
    def once_killed(folder: Path, number: int) -> int:
        (folder / f"{number}-{os.getpid()}").touch()
        if number == 1 and len(list(folder.glob("1-*"))) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return number * number

    with tasks_on("local", Progress()) as tasks:
        assert tasks.workers >= 1
        assert dict(tasks(once_killed, [(tmp_path, n) for n in range(4)])) == {n: n * n for n in range(4)}
    assert len(list(tmp_path.glob("1-*"))) == 2


def test_error_of_a_task(cluster):
    def refuse():
        raise UsageError("This is wrong.")

    with tasks_on("local", Progress()) as tasks, pytest.raises(UsageError, match=r"^This is wrong\.$"):
        list(tasks(refuse, [()]))


def costs_of(cache: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in cache.glob("sensitivities/*/kl-*/*.json")}


def test_budget_has_equal_bytes(cluster, workspace, monkeypatch):
    def quantized(name, **options):
        monkeypatch.setenv("BITMILL_CACHE", str(workspace / f"cache-{name}"))
        given = {"sensitivity": "kl", "corrections": 0, "measure": 1, "progress": False, **RTN, **options}
        bitmill.quantize("model", budget="6bpw", out=name, **given)
        written = {file.name: file.read_bytes() for file in (workspace / name).glob("*.safetensors")}
        return written, costs_of(workspace / f"cache-{name}")

    serial = quantized("serial")
    killer = Killer(daemon=True)
    killer.start()
    parallel = quantized("parallel", ray="local")
    killer.join()
    assert killer.killed
    assert serial == parallel
    assert len(serial[0]) > 1
    assert len(serial[1]) == 4


def test_comparison_has_equal_results(cluster, workspace):
    def compared(name, **options):
        given = {"calib": RTN["calib"], "windows": 2, "prompts": ["w1"], "max_new_tokens": 2, "progress": False}
        found = bitmill.compare("model", ["rtn", "gptq"], [3, 8], out=name, **{**given, **options})
        times = {"quantize_time_s", "peak_memory_bytes"}
        return sorted((variant.model_dump(exclude=times) for variant in found.variants), key=lambda v: v["name"])

    serial = compared("serial")
    killer = Killer(daemon=True)
    killer.start()
    parallel = compared("parallel", ray="local")
    killer.join()
    assert killer.killed
    assert serial == parallel
    assert {variant["status"] for variant in serial} == {"done"}
