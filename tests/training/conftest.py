"""Quantized folders of a tiny model to train."""

from __future__ import annotations

import pytest
import torch

import bitmill
from helpers.tiny_models import tiny_model

METHODS = {
    "uniform": ("rtn", {"bits": 3, "group_size": 32}),
    "gptqt": ("gptqt", {"bits": 2}),
    "codebook": ("squeezellm", {"bits": 3}),
    "shared": ("aqlm", {"shared": True, "codebook_bits": 4, "rounds": 2, "sweeps": 1, "epochs": 1}),
}


@pytest.fixture(scope="session")
def teacher():
    return tiny_model("llama")


@pytest.fixture(scope="session")
def windows():
    return torch.randint(0, 128, (40, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def folders(tmp_path_factory, teacher, windows):
    """Shared, not to be changed: name -> folder."""
    made = {}

    def folder(name: str):
        if name not in made:
            method, options = METHODS[name]
            made[name] = tmp_path_factory.mktemp("train") / name
            bitmill.quantize(teacher, method, out=made[name], calib=windows[:8], measure=0, **options)
        return made[name]

    return folder
