"""Waiting threads of OpenMP sleep soon, unless the user has chosen otherwise or torch is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from bitmill.openmp import WAITING, limit_spinning


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    for name in WAITING:
        monkeypatch.setenv(name, "restored afterwards")
        monkeypatch.delenv(name)


def settings():
    return {name: os.environ[name] for name in WAITING if name in os.environ}


def test_limits_before_torch(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    limit_spinning()
    assert settings() == {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}


@pytest.mark.parametrize("name", WAITING)
def test_user_wins(monkeypatch, name):
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setenv(name, "active")
    limit_spinning()
    assert settings() == {name: "active"}


def test_too_late_after_torch():
    import torch  # noqa: F401

    limit_spinning()
    assert settings() == {}


def test_import_sets_and_children_inherit():
    child = "import os; print(os.environ['GOMP_SPINCOUNT'])"
    code = f"import bitmill, subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == 1000
