"""Token windows that calibrate a model, and those that are held out to measure it on."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bitmill.data.self_generated import generate_windows
from bitmill.data.text import Windows, check_windows, windows_hash
from bitmill.data.windows import (
    SELF,
    CalibrationData,
    check_context_length,
    check_special_tokens,
    check_vocabulary,
    count_windows,
    describe_held_out,
    special_tokens,
)
from bitmill.errors import SourceError, UsageError
from bitmill.models.streamed import StreamedModel
from bitmill.progress import Progress
from bitmill.sources.base import Source
from bitmill.tasks.base import task_of


@dataclass(frozen=True)
class JobData:
    """Tokens that calibrate and tokens that measure.

    Attributes:
        windows: token ids (samples, length) that calibrate; None for a data-free recipe.
        held_out: windows to measure on; None measures nothing.
        described: the report's entries `calibration` and `held_out`, each None where there is none.
        domains: domain -> number of its held-out windows, in their order; empty where there are no domains.
    """

    windows: Tensor | None = None
    held_out: Windows | None = None
    described: dict[str, Any] = field(default_factory=lambda: {"calibration": None, "held_out": None})
    domains: dict[str, int] = field(default_factory=dict)


def token_windows(
    source: Source,
    calibration: CalibrationData | Tensor | None,
    calibrates: bool,
    measure: int,
    device: str = "cpu",
    progress: Progress | None = None,
) -> JobData:
    """Return the token windows to calibrate and to measure on, and their description for the report.

    Args:
        source: the float model.
        calibration: text and number of windows, or token ids (windows, length), of which none are held out.
        calibrates: the recipe reads calibration windows.
        measure: windows to hold out and measure on, of each domain for a mixture; 0 for none. Where the model
            writes its own calibration text, they come from the default text of its task.
        device: where a model that writes its own text runs.
        progress: where progress is reported.

    Raises:
        CalibrationError: The text or the windows cannot be used.
        SourceError: The model has no tokenizer, or a pooling that is not supported.
    """
    if isinstance(calibration, Tensor):
        return _given_windows(calibration, source, calibrates)
    calibration = calibration or CalibrationData()
    self_generated = calibration.source == SELF
    task = task_of(source)
    described: dict[str, Any] = {"calibration": None, "held_out": None}
    calib: Tensor | None = None
    held_out: Windows | None = None
    domains: dict[str, int] = {}
    if calibrates or measure:
        check_context_length(source.config, calibration.seqlen)
    if measure:
        task.metric()  # a pooling that is not supported is refused now, and not after the last block
    if measure or (calibrates and not self_generated):
        text = task.default_text if self_generated else calibration.source
        windows = task.windows(text, task.reader(source))
    if calibrates:
        if self_generated:
            calib = _self_generated_windows(source, calibration, device, progress)
            prefix = _own_prefix(source)
        else:
            calib = windows.calibration(calibration.samples, calibration.seqlen, calibration.seed)
            prefix = windows.prefix
        check_vocabulary(source.config, task.token_ids(calib))
        entry = {**vars(calibration), "source": calibration.name, "prefix": list(prefix)}
        if not self_generated:
            entry |= windows.describe("calib", calibration.samples)
        described["calibration"] = {**entry, "sha256": windows_hash(calib)}
    if measure:
        held_out = windows.held_out("eval", calibration.seqlen, measure)
        check_vocabulary(source.config, task.token_ids(held_out))
        entry = describe_held_out(windows, text, "eval", calibration.seqlen, measure)
        domains = windows.domains("eval", calibration.seqlen, measure)
        count = count_windows(held_out, calibration.seqlen, domains)
        described["held_out"] = {**entry, "windows": count}
    return JobData(calib, held_out, described, domains)


def calibration_windows(
    source: Source, calibration: CalibrationData, device: str, progress: Progress | None
) -> tuple[Tensor, dict[str, Any]]:
    """Return calibration windows of a text, or of text that the model writes itself.

    Args:
        source: the float model.
        calibration: text and number of windows.
        device: where a model that writes its own text runs.
        progress: where progress is reported.

    Returns:
        Token ids (samples, seqlen), and how they were cut from documents, empty where the text is one stream.

    Raises:
        CalibrationError: The text cannot be used.
    """
    if calibration.source == SELF:
        return _self_generated_windows(source, calibration, device, progress), {}
    task = task_of(source)
    reading = task.windows(calibration.source, task.reader(source))
    windows = reading.calibration(calibration.samples, calibration.seqlen, calibration.seed)
    check_vocabulary(source.config, task.token_ids(windows))
    return windows, reading.describe("calib", calibration.samples)


def _self_generated_windows(
    source: Source, calibration: CalibrationData, device: str, progress: Progress | None
) -> Tensor:
    """Return windows that the float model writes; the whole model is in memory while it does."""
    task = task_of(source)
    if not task.generates:
        raise UsageError(
            f"{source.name} is {task.description}, which writes no text; calibrate it on another text."
        )
    check_windows(calibration.samples, calibration.seqlen)
    prefix = _own_prefix(source)
    check_special_tokens(calibration.seqlen, len(prefix))
    check_vocabulary(source.config, torch.tensor(prefix, dtype=torch.int64), "tokenizer")
    streamed = StreamedModel(source, device)
    streamed.load(streamed.names())
    special = {getattr(source.config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    with contextlib.suppress(SourceError):  # without a tokenizer only the config names special tokens
        special |= set(source.tokenizer().all_special_ids)
    return generate_windows(
        streamed.model,
        calibration.samples,
        calibration.seqlen,
        calibration.seed,
        {token for token in special if isinstance(token, int)},
        progress,
        prefix,
    )


def _own_prefix(source: Source) -> tuple[int, ...]:
    """Return the tokens that the model's tokenizer puts before a text; none where there is no tokenizer."""
    try:
        tokenizer = source.tokenizer()
    except SourceError:
        return ()
    return special_tokens(tokenizer)[0]


def _given_windows(windows: Tensor, source: Source, calibrates: bool) -> JobData:
    """Return a caller's windows, checked, as `token_windows` does."""
    task = task_of(source)
    windows = task.checked(windows, source.config)
    if not calibrates:
        return JobData()
    calibration = {"source": "tokens" if task.reads == "text" else task.reads, "sha256": windows_hash(windows)}
    return JobData(windows, None, {"calibration": calibration, "held_out": None})
