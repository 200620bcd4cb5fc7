"""A quantized folder of a tiny model, and copies to change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import bitmill
from helpers.tiny_models import tiny_model


@pytest.fixture(scope="session")
def written(tmp_path_factory) -> Path:
    """Shared; not to be changed."""
    out = tmp_path_factory.mktemp("checkpoint") / "out"
    bitmill.quantize(tiny_model("llama"), "rtn", out=out, bits=4, group_size=16, measure=0)
    return out


@pytest.fixture
def folder(written, tmp_path) -> Path:
    """A copy to change."""
    return shutil.copytree(written, tmp_path / "out")
