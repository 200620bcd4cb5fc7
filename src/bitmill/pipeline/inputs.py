"""Data that the blocks of a job are quantized with, collected before the first one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bitmill.calibration.fisher import Fisher
from bitmill.calibration.output_gradients import OutputGradients
from bitmill.calibration.store import StatisticsStore, StoredBlock
from bitmill.calibration.streams import Streams
from bitmill.data.text import windows_hash
from bitmill.errors import CalibrationError, RecipeError
from bitmill.formats import Params
from bitmill.models.streamed import StreamedModel
from bitmill.numerics.statistics import FISHER
from bitmill.pipeline.job import Job, Sink
from bitmill.progress import Progress
from bitmill.tuners.base import OUTPUT_GRADIENTS, TARGETS
from bitmill.version import __version__


@dataclass(frozen=True)
class BlockInputs:
    """Data that every block of a job is quantized with.

    Attributes:
        streams: hidden states of the calibration windows; None where the job needs none, or all is in the store.
        store: the float model's statistics on disk; None where the job shares none.
        fisher: the Fisher diagonal; None where the recipe does not need it.
        shared: path of a linear in its block -> parts that its layers in all blocks share.
        gradients: of the model's loss by the blocks' outputs; None where no tuner needs them.
    """

    streams: Streams | None
    store: StatisticsStore | None
    fisher: Fisher | None
    shared: dict[str, Params]
    gradients: OutputGradients | None = None


def open_store(job: Job) -> StatisticsStore | None:
    """Open the folder in which jobs share the float model's statistics; None where this job shares none.

    Raises RecipeError unless the float model's hidden states are propagated: statistics of others cannot be
    shared.
    """
    if job.statistics is None or not job.needs or "samples" in job.needs:  # samples of inputs are not stored
        return None
    if job.propagate != "float":
        raise RecipeError(
            "Statistics can be shared only when the float model's are propagated; use propagate=float."
        )
    assert job.calibration is not None
    return statistics_store(job.statistics, job.streamed, job.calibration)


def statistics_store(folder: Path, streamed: StreamedModel, windows: Tensor) -> StatisticsStore:
    """Open the folder of the float model's statistics on calibration windows (windows, length).

    Raises:
        CalibrationError: the folder belongs to another model or text.
    """
    identity = {
        "model": streamed.source.fingerprint(),
        "windows": windows_hash(windows),
        "device": str(streamed.device),
        "versions": [__version__, torch.__version__],
    }
    return StatisticsStore(folder, identity)


def read_stored(job: Job, store: StatisticsStore | None, index: int) -> StoredBlock | None:
    """Read the shared statistics of a block, and note its largest hidden state; None where the job has none.

    Raises:
        CalibrationError: the file is damaged, or of another model.
    """
    if store is None or not uses_statistics(job) or not store.has(index):
        return None
    stored = store.load(index, job.streamed.device)
    if not {name for stage in stored.stages for name in stage} <= set(job.streamed.adapter.linears):
        raise CalibrationError(
            f"The statistics in {store.folder} name layers that the model has not; delete the folder."
        )
    if stored.largest_hidden_state is not None:
        job.streamed.note_largest(stored.largest_hidden_state)
    return stored


def uses_statistics(job: Job) -> bool:
    """Return True if a job needs statistics besides the Fisher diagonal, which has a pass of its own."""
    return bool(job.needs - FISHER)


@contextmanager
def fisher_for_job(job: Job, sink: Sink, progress: Progress) -> Iterator[Fisher | None]:
    """Measure the Fisher diagonal of a job's model, unless an earlier run left it; None where it is not needed.

    It is kept with the shared statistics, or in the sink's work folder, or else in a temporary folder.
    """
    if "fisher" not in job.needs:
        yield None
        return
    assert job.calibration is not None
    with tempfile.TemporaryDirectory(prefix="bitmill-") as temporary:
        fisher = Fisher(job.statistics or (sink.work or Path(temporary)) / "fisher")
        if not fisher.complete:
            fisher.measure(job.streamed, job.calibration, progress)
        yield fisher


@contextmanager
def output_gradients_for_job(job: Job, sink: Sink, progress: Progress) -> Iterator[OutputGradients | None]:
    """Measure the gradients by the blocks' outputs, unless an earlier run left them; None where none are needed.

    They are kept in the sink's work folder, or else in a temporary folder.
    """
    if not job.needs & OUTPUT_GRADIENTS:
        yield None
        return
    assert job.calibration is not None
    with tempfile.TemporaryDirectory(prefix="bitmill-") as temporary:
        gradients = OutputGradients((sink.work or Path(temporary)) / "output-gradients")
        if not gradients.complete:
            draws = max(tuner.draws for tuner in job.recipe.tuners)
            gradients.measure(job.streamed, job.calibration, draws, progress)
        yield gradients


def needs_streams(job: Job, store: StatisticsStore | None) -> bool:
    """Return True if calibration windows must pass the blocks."""
    if not uses_statistics(job):
        return False
    stored = store is not None and all(store.has(i) for i in range(len(job.streamed.blocks)))
    return not stored or compares_with_float(job)


def compares_with_float(job: Job) -> bool:
    """Return True if the float model's hidden states are needed in addition to the quantized model's."""
    return bool(job.needs & TARGETS) or compares_inputs(job)


def compares_inputs(job: Job) -> bool:
    """Return True if inputs of linears in the float and in the quantized model are compared."""
    return "cross" in job.needs and job.propagate == "quantized"
