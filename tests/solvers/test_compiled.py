"""Compiled steps of the solvers against those in torch, alike on every instruction set and number of threads."""

from __future__ import annotations

import pytest
import torch

from bitmill import native
from bitmill.formats import FORMATS
from bitmill.formats.base import Format
from bitmill.numerics.statistics import Statistics
from bitmill.solvers.base import output_error, solve
from bitmill.solvers.gptq import GPTQ
from helpers.native_kernels import ALL_ISAS, needs_native

pytestmark = needs_native
FORMATS_RUN = {
    "uniform 3": ("uniform", {"bits": 3, "group_size": 40}),
    "uniform row": ("uniform", {"bits": 4, "group_size": "row"}),
    "codebook": ("codebook", {"bits": 4, "group_size": "row"}),
    "binary coding": ("binary_coding", {"bits": 2, "group_size": 48}),
    "gptqt": ("integer_coding", {"bits": 3, "group_size": 32}),
    "nvfp4": ("nvfp4", {"bits": 4}),
    "8 bits": ("uniform", {"bits": 8, "group_size": 64}),  # stays in torch
}
SOLVERS = {
    "local": GPTQ(act_order=False, static_groups=False),
    "ordered": GPTQ(),
    "descent": GPTQ(column_passes=2, group_passes=1, importance="inverse"),
}


def problem(rows: int = 70, columns: int = 200) -> tuple[torch.Tensor, Statistics]:
    draw = torch.Generator().manual_seed(3)
    W = torch.randn(rows, columns, generator=draw)
    W[5] = 0
    X = torch.randn(400, columns, generator=draw)
    X += 0.5 * X.roll(1, 1) + X[:, :1]
    return W, Statistics(X.T @ X / 400, 400)


def made(format: str, solver: str) -> tuple[Format, GPTQ]:
    name, options = FORMATS_RUN[format]
    chosen, solving = FORMATS.get(name)(**options), SOLVERS[solver]
    if reason := solving.unsupported_reason(chosen):
        pytest.skip(reason)
    return chosen, solving


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("format", FORMATS_RUN)
def test_against_torch(format: str, solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, solving = made(format, solver)
    W, stats = problem()
    found = solve(solving, W, stats, chosen)
    monkeypatch.setattr(native, "_native", None)
    expected = solve(solving, W, stats, chosen)
    errors = [output_error(W, each.dequantize(), stats.gram) for each in (found, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=5e-3)
    assert (found.dequantize() == expected.dequantize()).float().mean() > 0.98


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("format", ["uniform 3", "gptqt"])
def test_bytes_are_equal_everywhere(format: str, solver: str) -> None:
    chosen, solving = made(format, solver)
    W, stats = problem()
    library, before, threads = native.native(), native.native().isa(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = solve(solving, W, stats, chosen)
        for name in ALL_ISAS:
            for count in (1, 2):
                library.use_isa(name)
                torch.set_num_threads(count)
                found = solve(solving, W, stats, chosen)
                assert torch.equal(found.codes, expected.codes), (name, count)
                assert all(torch.equal(value, expected.params[key]) for key, value in found.params.items())
    finally:
        library.use_isa(before)
        torch.set_num_threads(threads)
