"""The process that runs one program of a model: it gives up what the program does not need, then executes it.

Started by its path from `sandbox.py`, as `python -I -S -B sandbox_process.py`, it imports nothing but the
standard library. Its stdin holds the program and a secret, which it writes to its stdout, a file, only after the
program ran to its end: a program that exits, or prints something, does not know the secret.

On Linux the process gives up rights, also as root: by Landlock those to read and write files, by a seccomp filter
the system calls that start processes, reach a network or signal other processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import platform
import signal
import struct
import sys
import types
from collections.abc import Sequence
from typing import Any

FILES, PROCESSES = "files", "processes and network"  # what a program is kept from, in the answer

# Numbers of system calls on x86-64 and on arm64; None where an architecture does not have the call.
_FORBIDDEN_CALLS: dict[str, tuple[int | None, int | None]] = {
    "fork": (57, None),
    "vfork": (58, None),
    "clone": (56, 220),
    "clone3": (435, 435),
    "execve": (59, 221),
    "execveat": (322, 281),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "io_uring_setup": (425, 425),  # opens sockets without a call of its own for each
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "ptrace": (101, 117),
    "process_vm_writev": (311, 271),
    "prlimit64": (302, 261),
    "shmget": (29, 194),  # memory that outlives the process
    "mq_open": (240, 180),
    "chmod": (90, None),  # Landlock does not restrict owners, modes and attributes
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "utimensat": (280, 88),
}
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, number in a filter
_FOREIGN_ABI = 0x40000000  # numbers of x86-64 from here on are those of another calling convention
_SIGNAL_WITH_PARENT, _NO_NEW_PRIVILEGES, _SET_SECCOMP, _SECCOMP_FILTER = 1, 38, 22, 2
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # equal on both architectures
_READ = 1 << 2 | 1 << 3  # files and folders
_WRITE = 1 << 1 | 1 << 5 | 1 << 8 | 1 << 14  # write, delete, create and truncate files, but make no folders
_RIGHTS_BY_VERSION = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1}  # all about files; 3 adds truncation
_CAPABILITY_VERSION = 0x20080522


def main() -> None:
    """Run the program of the request on stdin; write the secret and the protections to stdout if it ends."""
    request = json.load(sys.stdin)
    answer = _keep_only_answer()
    _limit(request["limits"])
    protections = _confine(request["readable"])
    module = types.ModuleType("program")
    sys.modules["program"] = module
    exec(compile(request["program"], "program", "exec"), module.__dict__)
    os.write(answer, "\n".join([request["secret"], *protections]).encode())
    os._exit(0)


def _keep_only_answer() -> int:
    """Replace stdin, stdout and stderr by /dev/null, and return a descriptor of the old stdout."""
    answer = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(null, descriptor)
    os.close(null)
    return answer


def _limit(limits: dict[str, int]) -> None:
    """Set the limits of resources, by their names in the module `resource`; systems differ in those they have."""
    import resource

    for name, value in limits.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (value, value))


def _confine(readable: Sequence[str]) -> list[str]:
    """Give up rights where the kernel can take them, and return what the program is kept from."""
    if not sys.platform.startswith("linux") or platform.machine() not in _ARCHITECTURES:
        return []
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_SIGNAL_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        return []
    files = _restrict_files(libc, readable)
    _drop_capabilities(libc)
    processes = _forbid_calls(libc, *_ARCHITECTURES[platform.machine()])
    return [FILES] * files + [PROCESSES] * processes


def _restrict_files(libc: Any, readable: Sequence[str]) -> bool:
    """Allow reading in some folders, and files in the current one; False where that cannot be enforced."""
    version = min(3, libc.syscall(_LANDLOCK_CREATE, None, 0, 1))
    if version < 1:
        return False
    rights = _RIGHTS_BY_VERSION[version]
    handled = ctypes.create_string_buffer(struct.pack("=Q", rights), 8)
    rules = libc.syscall(_LANDLOCK_CREATE, handled, 8, 0)
    for folder, allowed in [*((folder, _READ) for folder in readable), (".", (_READ | _WRITE) & rights)]:
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_PATH)
            libc.syscall(_LANDLOCK_ADD, rules, 1, struct.pack("=Qi", allowed, descriptor), 0)
            os.close(descriptor)
    enforced = libc.syscall(_LANDLOCK_RESTRICT, rules, 0) == 0
    os.close(rules)
    return enforced and version == 3


def _drop_capabilities(libc: Any) -> None:
    """Give up the rights that root has beyond those of a user."""
    libc.capset(struct.pack("=Ii", _CAPABILITY_VERSION, 0), bytes(24))


def _forbid_calls(libc: Any, column: int, architecture: int) -> bool:
    """Let the forbidden system calls fail with EPERM; False where the kernel has no filters.

    Args:
        libc: the C library.
        column: of the numbers of the architecture.
        architecture: its number; calls by the convention of another one end the process.
    """
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06  # instructions of the filter
    numbers = [number for row in _FORBIDDEN_CALLS.values() if (number := row[column]) is not None]
    instructions = [
        (load, 0, 0, 4),  # the architecture of the call
        (equal, 1, 0, architecture),
        (give, 0, 0, _KILL),
        (load, 0, 0, 0),  # its number
        (at_least, 0, 1, _FOREIGN_ABI),
        (give, 0, 0, _KILL),
        *(step for number in numbers for step in ((equal, 0, 1, number), (give, 0, 0, _REFUSE))),
        (give, 0, 0, _ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in instructions))
    program = struct.pack("@HP", len(instructions), ctypes.addressof(code))
    return bool(libc.prctl(_SET_SECCOMP, _SECCOMP_FILTER, program, 0, 0) == 0)


if __name__ == "__main__":
    main()
