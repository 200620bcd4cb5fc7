"""The Fisher diagonal of a job's model, measured once."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bitmill.calibration.fisher import Fisher
from bitmill.pipeline.job import Job, Sink
from bitmill.progress import Progress


@contextmanager
def fisher_for_job(job: Job, sink: Sink, progress: Progress) -> Iterator[Fisher | None]:
    """The Fisher diagonal of a job's model, measured unless an earlier run left it; None where nobody needs it.

    It is kept with the shared statistics, or where the sink works, or else in a temporary folder.
    """
    if "fisher" not in job.recipe.needs:
        yield None
        return
    assert job.calibration is not None
    with tempfile.TemporaryDirectory(prefix="bitmill-") as temporary:
        fisher = Fisher(job.statistics or (sink.work or Path(temporary)) / "fisher")
        if not fisher.complete:
            fisher.measure(job.streamed, job.calibration, progress)
        yield fisher
