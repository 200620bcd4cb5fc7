"""What a run will take, shown before it starts."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from bitmill.calibration.token_windows import JobData
from bitmill.errors import one_line
from bitmill.pipeline.loop import QUANTIZING
from bitmill.report.text import describe_plan
from bitmill.workflows.estimate import describe_duration, estimate_job
from bitmill.workflows.prepare import PreparedJob
from bitmill.workflows.probe import short_trial

_WEIGHTS = 5_000_000  # fewer take seconds, of which nothing is shown
_SHORT_S = 60.0  # a run that is over soon is not worth a trial of its head, its memory and its measurement
_BLOCKS = 12  # a trial takes the time of about two blocks, which pays where there are many


def announced(prepared: PreparedJob, data: JobData, identity: dict[str, Any]) -> PreparedJob:
    """Show method, bits, file size, time and memory of a job, where its progress is shown.

    Args:
        prepared: the job.
        data: the tokens that calibrate and that measure.
        identity: everything that decides the bytes of the result.

    Returns:
        The job, whose time starts later by that of the trial.
    """
    request, plan = prepared.request, prepared.plan
    if not getattr(request.progress, "shown", False) or prepared.resolved is None or request.resume:
        return prepared
    if plan["quantized_weights"] < _WEIGHTS:
        return prepared
    if len(prepared.streamed.blocks) < _BLOCKS:
        request.progress.note(describe_plan(plan))
        return prepared
    began = time.perf_counter()
    try:
        blocks = short_trial(prepared, data)
        if blocks.seconds < _SHORT_S:
            request.progress.note(f"{describe_plan(plan)}, blocks in about {describe_duration(blocks.seconds)}")
            request.progress.expect(QUANTIZING, blocks.seconds)
            return _started_later(prepared, time.perf_counter() - began)
        found = estimate_job(prepared, data, identity)
    except Exception as error:  # the run itself decides what is an error
        request.progress.note(f"{describe_plan(plan)}; time and memory are unknown ({one_line(error)})")
        return prepared
    request.progress.note(str(found))
    request.progress.expect(QUANTIZING, found.block_seconds)
    return _started_later(prepared, time.perf_counter() - began)


def _started_later(prepared: PreparedJob, seconds: float) -> PreparedJob:
    """Return a job whose time leaves out that of a trial."""
    request = prepared.request
    return replace(prepared, request=replace(request, started=request.started + seconds))
