"""Programs that know nothing of bitmill open its folders when `bitmill exec` runs them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import bitmill
from helpers.tiny_models import tiny_model

PROGRAM = """
import subprocess, sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert any(type(module).__name__ == "QuantLinear" for module in model.modules())
if len(sys.argv) == 2:
    subprocess.run([sys.executable, __file__, sys.argv[1], "child"], check=True)
print("loaded")
"""


def execute(*words: str, **environment: str) -> subprocess.CompletedProcess:
    import os

    command = [sys.executable, "-m", "bitmill", "exec", *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.fixture
def folder(tmp_path):
    bitmill.quantize(tiny_model("llama"), "rtn", bits=4, out=tmp_path / "packed", measure=0)
    return tmp_path / "packed"


def test_program_and_its_children_open_folders(folder, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    hidden = tmp_path / "site"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text("print('hidden one ran')")
    done = execute("--", sys.executable, str(tmp_path / "program.py"), str(folder), PYTHONPATH=str(hidden))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("loaded") == 2
    assert "hidden one ran" in done.stdout


def test_exit_status_and_options_are_the_programs(tmp_path):
    done = execute("--", sys.executable, "-c", "import sys; print(sys.argv); sys.exit(7)", "--quiet", "-v")
    assert done.returncode == 7
    assert "'--quiet', '-v'" in done.stdout


def test_absent_program():
    done = execute("--", "no-such-program")
    assert done.returncode == 2
    assert "'no-such-program' cannot be run" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_torch_is_imported_by_itself():
    check = "import sys; print('torch' in sys.modules, 'bitmill' in sys.modules)"
    assert execute("--", sys.executable, "-c", check).stdout.strip() == "False True"
    assert torch.__version__
