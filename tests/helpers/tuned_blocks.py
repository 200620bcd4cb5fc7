"""A tiny model, quantized block by block with tuners, and its divergence on held-out windows."""

from __future__ import annotations

import torch

from bitmill.formats import Format
from bitmill.formats.uniform import Uniform
from bitmill.models.streamed import StreamedModel
from bitmill.pipeline import BlockResult, run
from bitmill.recipes.recipe import Recipe
from bitmill.solvers import Solver
from bitmill.solvers.nearest import Nearest
from bitmill.sources.module import ModuleSource
from bitmill.tuners import Tuner
from helpers.jobs import job_of
from helpers.tiny_models import tiny_model

draw = torch.Generator().manual_seed(3)
CALIBRATION, HELD_OUT = (torch.randint(3, 128, (32, 32), generator=draw) for _ in range(2))


class Keep:
    """A sink that keeps the blocks."""

    work = None

    def __init__(self) -> None:
        self.blocks: list[BlockResult] = []

    def finished(self, index: int) -> None:
        return None

    def write(self, result: BlockResult, streamed: StreamedModel) -> None:
        self.blocks.append(result)


def quantized_by(recipe: Recipe) -> tuple[list[BlockResult], float]:
    """Return the blocks of a tiny llama, and the divergence from the float model on held-out windows."""
    sink = Keep()
    job = job_of(StreamedModel(ModuleSource(tiny_model("llama"))), recipe, CALIBRATION, HELD_OUT)
    return sink.blocks, run(job, sink)["kl_divergence"]


def quantized(
    *tuners: Tuner, format: Format | None = None, solver: Solver | None = None
) -> tuple[list[BlockResult], float]:
    """`quantized_by` a recipe of these parts; 2 bits in groups of 16, rounded to nearest."""
    return quantized_by(Recipe("test", format or Uniform(2, 16), solver or Nearest(), tuners=tuners))
