"""The one calibration loop: block by block, from float weights to packed shards."""

from bitmill.pipeline.job import BlockResult, Job, LayerResult, Sink
from bitmill.pipeline.loop import run

__all__ = ["BlockResult", "Job", "LayerResult", "Sink", "run"]
