"""bitmill doctor tells what is there, and what is wrong."""

from __future__ import annotations

import json

import pytest

from bitmill import native
from bitmill.cli.main import main
from bitmill.recipes.method import METHODS
from bitmill.workflows import doctor
from bitmill.workflows.doctor import diagnose


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BITMILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "_MIN_FREE_BYTES", 0)


def test_sound_installation(capsys, monkeypatch):
    monkeypatch.delenv("BITMILL_KERNEL", raising=False)
    status = main(["doctor", "--json", "-q"])
    found = json.loads(capsys.readouterr().out)
    assert status == bool(found["problems"])
    assert {"bitmill", "python", "torch", "transformers"} <= set(found["versions"])
    assert found["machine"]["cores"] >= 1
    assert found["cache"]["writable"]
    assert list(found["kernels"]["of_methods"]["cpu"]) == METHODS.names()
    assert all(one["install"].startswith("pip install") for one in found["packages"])


def test_as_text(capsys):
    main(["doctor", "-q"])
    out = capsys.readouterr().out
    for word in ("instruction sets", "compiled kernels", "Optional packages", "problem"):
        assert word in out


def test_missing_and_old_packages(monkeypatch):
    monkeypatch.setattr(
        doctor, "requires", lambda _: ["torch>=99", "nowhere-to-be-found>=2", "transformers", "x; extra == 'dev'"]
    )
    problems = diagnose()["problems"]
    assert "torch is" in problems[0]
    assert "pip install 'nowhere-to-be-found>=2'" in problems[1]
    assert not [sentence for sentence in problems if sentence.startswith("x ")]


def test_no_compiled_kernels(monkeypatch, capsys):
    monkeypatch.setattr(native, "_native", None)
    monkeypatch.setattr(native, "import_error", "no file")
    assert main(["doctor", "-q"]) == 1
    assert "compiled kernels are not installed (no file)" in capsys.readouterr().err


def test_torch_cannot_be_imported(monkeypatch):
    def refuse(name):
        raise ImportError("libcudart.so is missing")

    monkeypatch.setattr(doctor.importlib, "import_module", refuse)
    found = diagnose()
    assert found["versions"]["torch"] is None
    assert found["kernels"] == {}
    assert "torch cannot be imported (libcudart.so is missing)" in found["problems"][0]
