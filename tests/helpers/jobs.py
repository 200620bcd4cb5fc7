"""Jobs for the pipeline, resolved from a recipe and a model."""

from __future__ import annotations

from torch import Tensor

from bitmill.calibration.token_windows import JobData
from bitmill.data.text import Windows
from bitmill.models.streamed import StreamedModel
from bitmill.pipeline.job import Job
from bitmill.recipes.recipe import Recipe
from bitmill.recipes.resolve import resolve_recipe


def job_of(
    streamed: StreamedModel, recipe: Recipe, calibration: Tensor | None = None, held_out: Windows | None = None
) -> Job:
    """Return a job with these windows."""
    return Job(streamed, resolve_recipe(recipe, streamed), JobData(calibration, held_out))
