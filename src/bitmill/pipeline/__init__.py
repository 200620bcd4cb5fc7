"""The one calibration loop: block by block, from float weights to packed shards."""

from bitmill.pipeline.loop import BlockResult, Job, LayerResult, Sink, run

__all__ = ["BlockResult", "Job", "LayerResult", "Sink", "run"]
