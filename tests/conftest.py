"""Fixtures of all tests: seeds, one thread, and memory that is filled with NaN."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from bitmill.evaluation import reference

pytest.register_assert_rewrite("helpers")

# Exact everywhere; the tests of the compiled kernels ask for them.
os.environ.setdefault("BITMILL_KERNEL", "reference")

# The default calibration text is downloaded; this one is inside Python.
os.environ.setdefault("BITMILL_CALIB", "pydoc")

# Every model that is quantized and measured runs packed, too; a few tokens suffice where that is not the subject.
reference.TOKENS = 8

settings.register_profile("bitmill", deadline=None, max_examples=40, derandomize=True, database=None)
settings.load_profile("bitmill")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """torch.empty hands out NaN (floats) or the largest number (integers): nothing may rely on what it holds."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(before)
