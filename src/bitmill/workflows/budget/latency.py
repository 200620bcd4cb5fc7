"""Measured times of the kernels of this machine, by format, shape and tokens, kept for further budgets."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bitmill.config.documents import read_json_object
from bitmill.errors import CalibrationError
from bitmill.files import make_folder, output_errors, write_text
from bitmill.formats import Format, Wrapper
from bitmill.numerics.rng import normals
from bitmill.numerics.statistics import Statistics
from bitmill.runtime.kernels import KernelSpec, choose_kernel
from bitmill.solvers import SOLVERS
from bitmill.solvers.base import solve_stacked
from bitmill.sources.cache import cache_folder
from bitmill.workflows.bench.kernels import machine_of_kernels, random_packed
from bitmill.workflows.bench.memory import copies_of, linear_time, timed
from bitmill.workflows.machine import processor

TURNS = 5
_LIMIT_BYTES = 16 << 20
_CPU = torch.device("cpu")


class LatencyTable:
    """Seconds that a layer takes for so many tokens, measured when they are first asked for.

    The file in the cache belongs to a processor, the number of threads, the instruction set, and the type that
    inputs are rounded to.

    Attributes:
        measured: layers that were measured, not read.
    """

    def __init__(self, tokens: int, on_case: Callable[[str], None] = lambda name: None) -> None:
        """Read the table of this machine.

        Args:
            tokens: rows of the input.
            on_case: called with the name of each layer before it is measured.
        """
        self._tokens, self._on_case, self.measured = tokens, on_case, 0
        self.machine = {"cpu": processor(), **machine_of_kernels()}
        digest = hashlib.sha256(json.dumps([self.machine, tokens], sort_keys=True).encode()).hexdigest()[:16]
        self.file = cache_folder() / "latency" / f"{digest}.json"
        self._times: dict[str, float] = {}
        if self.file.exists():
            data = read_json_object(self.file, CalibrationError, _LIMIT_BYTES, f"delete {self.file}")
            times = data.get("seconds")
            if not isinstance(times, dict) or not all(map(_is_time, times.values())):
                raise CalibrationError(f"{self.file} holds no times of layers; delete it.")
            self._times = times

    def seconds(self, format: Format | None, shape: tuple[int, int]) -> float:
        """Return the seconds of a layer; None is a layer in float."""
        key = json.dumps([None if format is None else format.to_dict(), *shape], sort_keys=True)
        if key not in self._times:
            self._on_case(f"timing {'float' if format is None else format.name} {shape[0]} x {shape[1]}")
            self._times[key] = layer_seconds(format, shape, self._tokens)
            self.measured += 1
            known = {"machine": self.machine, "tokens": self._tokens, "seconds": self._times}
            with output_errors(self.file):
                make_folder(self.file.parent)
                write_text(self.file, json.dumps(known, indent=1))
        return self._times[key]


def _is_time(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value >= 0


@torch.no_grad()
def layer_seconds(format: Format | None, shape: tuple[int, int], tokens: int, turns: int = TURNS) -> float:
    """Return the median time of a layer with cold weights.

    Args:
        format: as stored, inputs included; None for a layer in float.
        shape: (out, in).
        tokens: rows of the input.
        turns: measurements.
    """
    x = normals(0, 0, tokens * shape[1]).to(torch.float32).view(tokens, shape[1])
    if format is None:
        weights = [torch.randn(shape) for _ in range(copies_of(4 * shape[0] * shape[1]))]
        return median(linear_time(weights, x) for _ in range(turns))
    spec = KernelSpec(format, shape, _CPU)
    kernel = choose_kernel(spec)(spec, _packed(format, shape))
    copies = copies_of(format.stored_bits(shape) // 8)
    kernels = [kernel, *(copy.deepcopy(kernel) for _ in range(copies - 1))]
    kernel.apply(x)
    return median(timed(lambda: [k.apply(x) for k in kernels]) / len(kernels) for _ in range(turns))


def _packed(format: Format, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Return packed tensors of a layer: random ones, or of random weights for a wrapper."""
    if not isinstance(format, Wrapper):
        return random_packed(format, shape)
    W = 0.02 * normals(1, 0, shape[0] * shape[1]).to(torch.float32).view(shape)
    columns = torch.ones(shape[1])
    inputs = Statistics(torch.eye(shape[1]), 1, mean_abs=columns, max_abs=columns)
    [layer] = solve_stacked(SOLVERS.from_dict({"solver": "nearest"}), [W], inputs, format)
    return layer.pack()
