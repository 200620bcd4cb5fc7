"""Two processes that share the batches of a quantization-aware training have the losses of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import data_parallel
from helpers.selection import FULL

TESTS = Path(__file__).parents[1]


@pytest.mark.skipif(not FULL, reason="two more processes: in make test-all")
def test_two_processes_have_the_losses_of_one(tmp_path):
    words = [sys.executable, "-m", "helpers.data_parallel", str(tmp_path / "meeting"), "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    processes = [
        subprocess.Popen([*words, str(rank)], stdout=subprocess.PIPE, text=True, env=environment)
        for rank in (0, 1)
    ]
    try:
        printed = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0]
    expected = data_parallel.losses(data_parallel.alone)
    assert expected[-1] < expected[0]
    for found in map(json.loads, printed):
        assert found["replicated"] == pytest.approx(expected, abs=1e-4)
        assert found["sharded"] == pytest.approx(expected, abs=1e-4)
