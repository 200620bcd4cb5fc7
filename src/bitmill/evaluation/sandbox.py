"""Run programs that a model wrote, each in a process of its own with limited resources and rights."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bitmill.errors import UsageError
from bitmill.evaluation import sandbox_process

_MEGABYTE = 1 << 20
_PROBE = "import ctypes, json, math, random"  # extension modules, and libraries that they need


@dataclass(frozen=True)
class Limits:
    """Limits of one program.

    cpu_s: seconds of processor time.
    time_s: seconds after which it is killed.
    memory_bytes: address space.
    file_bytes: size of a file that it writes.
    """

    cpu_s: int = 5
    time_s: float = 20.0
    memory_bytes: int = 1024 * _MEGABYTE
    file_bytes: int = _MEGABYTE

    def resources(self) -> dict[str, int]:
        """Return the limits that the operating system enforces, by their names in the module `resource`."""
        return {
            "RLIMIT_CPU": self.cpu_s,
            "RLIMIT_AS": self.memory_bytes,
            "RLIMIT_FSIZE": self.file_bytes,
            "RLIMIT_NPROC": 1,  # no other process or thread; not enforced for root, where the filter forbids them
            "RLIMIT_NOFILE": 64,
            "RLIMIT_CORE": 0,
        }


class Sandbox:
    """Runs programs one at a time.

    Attributes:
        unprotected: what this operating system does not keep programs from: "files", "processes and network".
    """

    def __init__(self, limits: Limits | None = None) -> None:
        """Try a small program. Raises UsageError where none can be run."""
        self.limits = limits or Limits()
        if os.name != "posix":
            raise UsageError("Programs are run on Linux and macOS only; leave out the tasks that run them.")
        protections = self._run(_PROBE)
        if protections is None:
            raise UsageError(
                f"{sys.executable} cannot run a small program in a process of its own; leave out the tasks that "
                "run programs."
            )
        everything = (sandbox_process.FILES, sandbox_process.PROCESSES)
        self.unprotected = tuple(name for name in everything if name not in protections)

    def passes(self, program: str) -> bool:
        """Return True where a program runs to its last line within the limits, without an exception.

        Args:
            program: Python code, tests included.
        """
        return self._run(program) is not None

    def _run(self, program: str) -> list[str] | None:
        """Return what a program was kept from; None where it did not run to its end."""
        secret = secrets.token_hex(16)
        readable = {sys.base_prefix, sys.base_exec_prefix, "/usr", "/lib", "/lib64"}
        request = {
            "program": program,
            "secret": secret,
            "readable": sorted(readable),
            "limits": self.limits.resources(),
        }
        script = str(Path(sandbox_process.__file__))
        with (
            tempfile.TemporaryDirectory(prefix="bitmill-program-", ignore_cleanup_errors=True) as folder,
            tempfile.TemporaryFile() as answer,
        ):
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", script],
                stdin=subprocess.PIPE,
                stdout=answer,  # a file, whose size is limited
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={},
                start_new_session=True,
            )
            try:
                process.communicate(json.dumps(request).encode(), timeout=self.limits.time_s)
            except subprocess.TimeoutExpired:
                pass
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            answer.seek(0)
            lines = answer.read(1000).decode(errors="replace").split("\n")
        return lines[1:] if lines[0] == secret else None
