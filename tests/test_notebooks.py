"""The code of every notebook runs from its first cell to its last."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.selection import FULL

NOTEBOOKS = sorted((Path(__file__).parent.parent / "examples" / "notebooks").glob("*.ipynb"))


def code_of(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_compiles(notebook: Path) -> None:
    cells = code_of(notebook)
    assert cells
    for number, cell in enumerate(cells, 1):
        compile(cell, f"{notebook.name}, cell {number}", "exec")


@pytest.mark.real
@pytest.mark.skipif(not FULL, reason="runs in make test-all")
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(notebook: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    (tmp_path / "cells.py").write_text("\n\n".join(code_of(notebook)), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "cells.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
