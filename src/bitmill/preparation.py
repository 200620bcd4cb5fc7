"""What is settled before the first block: what will be stored, which tokens are read, what identifies the job."""

from __future__ import annotations

import contextlib
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitmill.checkpoint.files import folder_bytes
from bitmill.checkpoint.writer import work_of
from bitmill.composition import find_recipe, with_head
from bitmill.errors import CalibrationError, OutputError, SourceError, UsageError
from bitmill.evaluation.self_text import self_windows
from bitmill.leaderboard import leading_recipe
from bitmill.models import text
from bitmill.models.adapter import is_encoder
from bitmill.models.pooling import pooling_of
from bitmill.models.reading import reading_of, windows_of
from bitmill.models.skeleton import Skeleton
from bitmill.models.source import Source
from bitmill.progress import Progress
from bitmill.recipe import Recipe
from bitmill.version import __version__

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


def settled_recipe(
    method: str | Path | Recipe | None, options: dict[str, Any], head_bits: int | None = None
) -> tuple[Recipe, dict[str, str]]:
    """The recipe that is meant, and for the summary why it was `chosen`, where nobody named one.

    head_bits: of embedding and head, instead of what the recipe says of them.
    """
    if isinstance(method, Recipe):
        if options:
            raise UsageError(f"A Recipe is complete; change it instead of passing {', '.join(options)}.")
        return with_head(method, head_bits), {}
    if method is not None:
        return with_head(find_recipe(str(method), options), head_bits), {}
    recipe, reason = leading_recipe(options)
    return with_head(recipe, head_bits), {"chosen": reason}


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
        check_length(source.config, calibration.seqlen)
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
            "windows": windows_of(held_out, calibration.seqlen),
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
    skeleton = Skeleton(source, device)
    skeleton.load(skeleton.names())
    config = source.config
    never = {getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    with contextlib.suppress(SourceError):  # no tokenizer: the config's own are all that is known
        never |= set(source.tokenizer().all_special_ids)
    first = {token for token in never if isinstance(token, int)}
    return self_windows(skeleton.model, calibration.samples, calibration.seqlen, calibration.seed, first, progress)


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
    check_length(config, windows.shape[1])
    lowest, highest = int(windows.min()), int(windows.max())
    vocabulary = getattr(config, "vocab_size", None)
    if lowest < 0 or (isinstance(vocabulary, int) and highest >= vocabulary):
        known = f" below {vocabulary}" if isinstance(vocabulary, int) else ""
        raise CalibrationError(
            f"The calibration tensor holds the token {lowest if lowest < 0 else highest}, but the model's ids are "
            f"0 and up{known}; give windows made with the model's own tokenizer."
        )
    return windows


def job_identity(
    source: Source,
    recipe: Recipe | None,
    calib: Tensor | None,
    held_out: text.Windows | None,
    described: dict[str, Any],
    device: str,
    propagate: str = "quantized",
    kv: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that decides the bytes of the result.

    recipe: None where weights stay as they are.  kv: method and calibration text of keys and values.
    """
    import numpy
    import safetensors
    import transformers

    return {
        "source": source.name,  # named in the report and the card
        "model": source.fingerprint(),
        "recipe": recipe.to_dict() if recipe is not None else None,
        **({"kv": kv} if kv else {}),
        "calibration": described["calibration"],
        "propagate": propagate if calib is not None else None,
        "held_out": None if held_out is None else text.windows_hash(held_out),
        "versions": {
            "bitmill": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
            "numpy": numpy.__version__,
        },
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),  # which vector instructions torch's kernels use
        "device": device,
        "gpu": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None,
        "threads": torch.get_num_threads(),
    }


def check_space(out: Path, size_bytes: int) -> None:
    """Refuse a job that cannot fit on the disk before it has cost hours.

    What an unfinished run wrote already needs no more space.
    """
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    try:
        held = folder_bytes(work_of(out) / "model")
    except OSError:  # another process is writing there, which the sink will refuse
        held = 0
    if free + held < size_bytes:
        raise OutputError(
            f"The result needs {(size_bytes - held) / 1e6:.0f} MB and {parent} has {free / 1e6:.0f} MB free; "
            "free some space or choose another folder with -o."
        )


def check_device(device: str) -> None:
    """Raises UsageError for a device that torch does not have here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UsageError(f"The device {device!r} is not available here ({reason}); use --device cpu.") from None


def check_length(config: Any, seqlen: int, flag: str = "--seqlen") -> None:
    """Raises CalibrationError for windows longer than the model can read."""
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and seqlen > limit:
        raise CalibrationError(f"seqlen is {seqlen}, but the model reads at most {limit} tokens; lower {flag}.")
