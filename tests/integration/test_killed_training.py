"""A training that is killed at random moments and continued writes the bytes of an undisturbed one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from helpers.selection import FULL

PROGRAM = Path(__file__).parents[1] / "kill.py"  # forks, which a process with threads should not


def test_killed_training_gives_equal_bytes():
    moments = 10 if FULL else 3
    words = [sys.executable, str(PROGRAM), "--job", "train, efficientqat", "--moments", str(moments)]
    found = subprocess.run(
        words, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert found.returncode == 0, found.stderr[-2000:]
    killed = int(found.stdout.rpartition(" killed ")[2].split()[0])
    assert killed >= moments
