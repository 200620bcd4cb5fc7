"""Triton kernels: layout and choice here, the kernels themselves in a separate process.

TRITON_INTERPRET=1 must be set before Triton is imported, and must not reach other tests; see triton_kernels.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitmill.formats import FORMATS
from bitmill.numerics.packing import pack
from bitmill.runtime.kernels import KernelSpec, choose_kernel
from bitmill.runtime.kernels.base import KERNELS
from bitmill.runtime.kernels.triton import Triton
from bitmill.runtime.triton import available
from bitmill.runtime.triton.lanes import codes_of_lanes, codes_of_planes, from_words, lanes_in, to_lanes, to_planes

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPES = [((1, 1), 1), ((3, 7), 7), ((4, 130), 40), ((5, 577), 577), ((4, 256), 64), ((2, 2048), 2048)]


@pytest.mark.skipif(available.install_problem() is not None, reason=str(available.install_problem()))
@pytest.mark.parametrize("file", ["triton_kernels.py", "triton_kv.py"])
def test_interpreter_or_gpu(file):
    where = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    tests = Path(__file__).parent / file
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(tests)]
    run = subprocess.run(command, env={**os.environ, **where}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


@pytest.mark.parametrize(("shape", "width"), SHAPES, ids=str)
@pytest.mark.parametrize("bits", range(1, 9))
def test_lanes_and_planes_round_trip(shape, width, bits):
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8)
    packed, columns = pack(codes, bits), shape[1]
    for there, back in ((to_lanes, codes_of_lanes), (to_planes, codes_of_planes)):
        words = there(packed, bits, columns, width)
        assert words.shape == (shape[0], bits, lanes_in(columns, width))
        assert torch.equal(back(words, columns, width), codes)
        assert torch.equal(from_words(words, columns, width, back), packed)


def test_no_padding_of_whole_groups():
    packed = pack(torch.randint(0, 8, (4, 11008)), 3)
    assert to_lanes(packed, 3, 11008, 128).numel() == packed.numel()


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(available, "install_problem", lambda: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("BITMILL_KERNEL", raising=False)


def test_chosen_on_gpu(installed):
    for name in ("uniform", "binary_coding", "additive", "integer_coding"):
        assert choose_kernel(KernelSpec(FORMATS.get(name)(3), (8, 64), CUDA)) is Triton
    assert choose_kernel(KernelSpec(FORMATS.get("uniform")(3), (8, 64), CPU)) is not Triton


def test_reference_without_triton(installed, monkeypatch):
    monkeypatch.setattr(available, "install_problem", lambda: "Triton is not installed.")
    chosen = choose_kernel(KernelSpec(FORMATS.get("uniform")(3), (8, 64), CUDA))
    assert chosen is KERNELS.get("reference")


def test_unsupported_reason(installed, monkeypatch):
    uniform = FORMATS.get("uniform")(3)
    assert Triton.unsupported_reason(KernelSpec(uniform, (8, 64), CPU)) == "Triton runs on cuda here, not on cpu."
    assert "no Triton kernel" in Triton.unsupported_reason(KernelSpec(FORMATS.get("e8")(2), (8, 64), CUDA))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert Triton.unsupported_reason(KernelSpec(uniform, (8, 64), CPU)) is None
    assert Triton.unsupported_reason(KernelSpec(uniform, (8, 64), CUDA)) == "Triton runs on cpu here, not on cuda."


@pytest.mark.parametrize(("found", "reason"), [("3.2.0", "3.6 or later"), ("3.6.0", None), ("4.0.1+git", None)])
def test_old_versions_refused(monkeypatch, found, reason):
    monkeypatch.setattr(available, "find_spec", lambda name: True)
    monkeypatch.setattr(available, "version", lambda name: found)
    found = available.install_problem.__wrapped__()
    assert found is None if reason is None else reason in found
