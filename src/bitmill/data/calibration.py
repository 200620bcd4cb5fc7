"""Token windows that calibrate."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitmill.architectures.adapter import is_encoder
from bitmill.data import text
from bitmill.data.self_generated import generate_windows
from bitmill.data.windows import count_windows, reading_of
from bitmill.errors import CalibrationError, SourceError, UsageError
from bitmill.models.streamed import StreamedModel
from bitmill.progress import Progress
from bitmill.recipes.recipe import Recipe
from bitmill.sources.base import Source
from bitmill.sources.pooling import pooling_of

SELF = "self"  # a calibration source: the model writes its text itself
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Calibration:
    """Which text calibrates, and how much: `samples` windows of `seqlen` tokens, drawn with `seed`.

    source: pydoc, a .txt or .jsonl file, hf:dataset, or self: text that the float model writes.
    """

    source: str = "pydoc"
    samples: int = 128
    seqlen: int = 512
    seed: int = 0


def token_windows(
    source: Source,
    calibration: Calibration | Tensor | None,
    recipe: Recipe | None,
    measure: int,
    device: str = "cpu",
    progress: Progress | None = None,
) -> tuple[Tensor | None, text.Windows | None, dict[str, Any]]:
    """Token windows to calibrate and to measure on, and how to describe them in the report.

    Of windows that the caller gives nothing is held out; beside text of the model's own, pydoc is.
    Raises CalibrationError for text or windows of no use.
    """
    calibrates = recipe is not None and bool(recipe.needs)
    described: dict[str, Any] = {"calibration": None, "held_out": None}
    calib: Tensor | None = None
    held_out: text.Windows | None = None
    if isinstance(calibration, Tensor):
        given = _checked(calibration, source.config)
        if calibrates:
            calib = given
            described["calibration"] = {"source": "tokens", "sha256": text.windows_hash(given)}
        return calib, None, described
    calibration = calibration or Calibration()
    own = calibration.source == SELF
    if calibrates or measure:
        check_context_length(source.config, calibration.seqlen)
    if measure:
        pooling_of(source)  # one that cannot be measured is refused now, and not after the last block
    if measure or (calibrates and not own):
        name = Calibration.source if own else calibration.source
        reading = reading_of(name, source.tokenizer(), is_encoder(source.config))
    if calibrates:
        if own:
            calib = _own_windows(source, calibration, device, progress)
        else:
            calib = reading.calibration(calibration.samples, calibration.seqlen, calibration.seed)
        described["calibration"] = {**vars(calibration), "sha256": text.windows_hash(calib)}
    if measure:
        held_out = reading.held_out("eval", calibration.seqlen, measure)
        described["held_out"] = {
            "text": name,
            "split": "eval",
            "seqlen": calibration.seqlen,
            "windows": count_windows(held_out, calibration.seqlen),
        }
    return calib, held_out, described


def calibration_windows(
    source: Source, calibration: Calibration, device: str, progress: Progress | None
) -> Tensor:
    """Windows (samples, seqlen) of a text, or of what the float model writes. Raises CalibrationError."""
    if calibration.source == SELF:
        return _own_windows(source, calibration, device, progress)
    reading = reading_of(calibration.source, source.tokenizer(), is_encoder(source.config))
    return reading.calibration(calibration.samples, calibration.seqlen, calibration.seed)


def _own_windows(source: Source, calibration: Calibration, device: str, progress: Progress | None) -> Tensor:
    """Windows that the float model writes; it is in memory as a whole meanwhile."""
    if is_encoder(source.config):
        raise UsageError(f"{source.name} is an encoder, which writes no text; calibrate it on another one.")
    text.check_windows(calibration.samples, calibration.seqlen)
    streamed = StreamedModel(source, device)
    streamed.load(streamed.names())
    config = source.config
    never = {getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    with contextlib.suppress(SourceError):  # no tokenizer: the config's own are all that is known
        never |= set(source.tokenizer().all_special_ids)
    first = {token for token in never if isinstance(token, int)}
    return generate_windows(
        streamed.model, calibration.samples, calibration.seqlen, calibration.seed, first, progress
    )


def _checked(windows: Tensor, config: Any) -> Tensor:
    """A caller's windows (windows, length) as int64 on the CPU, if the model can read them."""
    if windows.is_meta or windows.dim() != 2 or not windows.numel():
        found = "without data (device 'meta')" if windows.is_meta else f"of shape {tuple(windows.shape)}"
        raise CalibrationError(f"The calibration tensor is one {found}; give token ids (windows, length).")
    if windows.dtype not in _INTEGERS:
        raise CalibrationError(
            f"The calibration tensor holds {str(windows.dtype).removeprefix('torch.')}; give integer token ids."
        )
    windows = windows.to("cpu", torch.int64)
    if windows.shape[1] < 2:
        raise CalibrationError("The calibration windows have 1 token; give windows of at least 2.")
    check_context_length(config, windows.shape[1])
    lowest, highest = int(windows.min()), int(windows.max())
    vocabulary = getattr(config, "vocab_size", None)
    if lowest < 0 or (isinstance(vocabulary, int) and highest >= vocabulary):
        known = f" below {vocabulary}" if isinstance(vocabulary, int) else ""
        raise CalibrationError(
            f"The calibration tensor holds the token {lowest if lowest < 0 else highest}, but the model's ids are "
            f"0 and up{known}; give windows made with the model's own tokenizer."
        )
    return windows


def check_context_length(config: Any, seqlen: int, flag: str = "--seqlen") -> None:
    """Raises CalibrationError for windows longer than the model can read."""
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and seqlen > limit:
        raise CalibrationError(f"seqlen is {seqlen}, but the model reads at most {limit} tokens; lower {flag}.")
