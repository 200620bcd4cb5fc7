"""Programs of a model pass only where they run to their end, and reach nothing outside their process."""

from __future__ import annotations

import os
import time

import pytest

from bitmill.errors import UsageError
from bitmill.evaluation import sandbox
from bitmill.evaluation.sandbox import Limits, Sandbox

ENDS = [
    "",
    "from math import pi\nassert pi > 3",
    "open('note', 'w').write('x')\nassert open('note').read() == 'x'",
]
FAILS = [
    "assert False",
    "print('passed')\nassert False",
    "raise SystemExit(0)",
    "import os\nos._exit(0)",
    "def f(:",
    "while True: pass",
    "x = [0] * 10**9",
    "import os\nfor fd in range(20):\n  try: os.write(fd, b'0' * 10**7)\n  except OSError: pass\nos._exit(0)",
]
REFUSED = [  # each raises an OSError, or a RuntimeError for a thread
    "import os; os.fork()",
    "import subprocess; subprocess.run(['true'])",
    "import threading; threading.Thread(target=print).start()",
    "import socket; socket.socket()",
    "import os; os.kill(os.getppid(), 9)",
    "open('note', 'w').write('x' * 10**7)",
    "open({outside!r}, 'a')",
    "open({outside!r})",
    "import os; os.unlink({outside!r})",
    "import os; os.truncate({outside!r}, 0)",
    "import os; os.chmod({outside!r}, 0)",
]


@pytest.fixture(scope="module")
def box():
    return Sandbox(Limits(cpu_s=1, memory_bytes=1 << 29))


@pytest.mark.parametrize("program", ENDS)
def test_programs_that_end(box, program):
    assert box.passes(program)


@pytest.mark.parametrize("program", FAILS)
def test_programs_that_fail(box, program):
    assert not box.passes(program)


def test_program_that_waits(box, monkeypatch):
    started = time.monotonic()
    monkeypatch.setattr(box, "limits", Limits(time_s=0.5))
    assert not box.passes("import time; time.sleep(60)")
    assert time.monotonic() - started < 30


def test_refused_actions(box, tmp_path):
    if box.unprotected:
        pytest.skip(f"This system does not protect {' and '.join(box.unprotected)}.")
    outside = tmp_path / "outside"
    outside.write_text("x")
    for action in REFUSED:
        code = action.format(outside=str(outside))
        program = f"try:\n    {code}\nexcept (OSError, RuntimeError): pass\nelse: raise ValueError"
        assert box.passes(program), action
    assert outside.read_text() == "x"


def test_nothing_is_left(box, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert box.passes("import os\nassert set(os.environ) <= {'LC_CTYPE'}\nopen('note', 'w').write(os.getcwd())")
    assert not list(tmp_path.iterdir())


def test_no_python(monkeypatch):
    monkeypatch.setattr(sandbox.sys, "executable", "/bin/false")
    with pytest.raises(UsageError, match="/bin/false cannot run a small program"):
        Sandbox()
    monkeypatch.setattr(os, "name", "nt", raising=True)
    with pytest.raises(UsageError, match="Linux and macOS only"):
        Sandbox()
