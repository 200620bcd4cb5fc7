"""How a model's keys and values are to be kept: settled, calibrated, put into a folder, looked up again."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bitmill.calibration.token_windows import calibration_windows
from bitmill.checkpoint.files import publish, writing
from bitmill.checkpoint.record import record_calibration, write_calibration
from bitmill.checkpoint.writer import check_new, work_of
from bitmill.data.text import windows_hash
from bitmill.data.windows import SELF, CalibrationData, TextWindows, check_context_length
from bitmill.errors import UsageError
from bitmill.evaluation.generate import PROMPT_CHUNK
from bitmill.kv.answers import PackedCacheLogits
from bitmill.kv.cache import QuantizedCache
from bitmill.kv.calibrate import calibrate
from bitmill.kv.calibration_file import KVCalibration, read_calibration
from bitmill.kv.config import FLOAT, KVConfig, calibration_command, describe, summary
from bitmill.kv.scheme import KVMethod
from bitmill.kv.support import calibration_bytes, check, packed_shapes, page_bits
from bitmill.models.streamed import StreamedModel
from bitmill.progress import Progress
from bitmill.runtime.modules.dequantize import dequantize_model
from bitmill.runtime.modules.packed import PackedMatrix
from bitmill.tasks.base import task_for
from bitmill.workflows.load import load, load_tokenizer, read_folder

SEQLEN = 2048
_CONTEXT = "max_position_embeddings"


def window_of(wanted: KVConfig, config: Any) -> int:
    """Tokens of a window that calibrates. Raises CalibrationError for more than the model reads."""
    if wanted.seqlen is not None:
        check_context_length(config, wanted.seqlen, "--kv-seqlen")
        return wanted.seqlen
    limit = getattr(config, _CONTEXT, None)
    return min(SEQLEN, limit) if isinstance(limit, int) else SEQLEN


def plan(model: nn.Module, method: KVMethod, name: str = "") -> dict[str, Any]:
    """What a method will come to, for report and summary; meta parameters suffice.

    Raises UsageError or RecipeError where model and method do not go together.
    """
    check(model, method, name)
    return {
        "method": method.to_dict(),
        "bits_per_element": page_bits(model, method),
        "size_bytes": calibration_bytes(model, method),
        "calibration": None,
    }


class KVCalibrationJob:
    """A KV method on its way into a new folder. plan: what report and summary say of it."""

    def __init__(self, wanted: KVConfig, streamed: StreamedModel) -> None:
        self.wanted, self.streamed, self.method = wanted, streamed, wanted.method()
        self.plan = plan(streamed.model, self.method, streamed.source.name)
        self.windows: Tensor | None = None

    def read(self, given: CalibrationData | Tensor | None, progress: Progress) -> None:
        """Settle the windows that calibrate, of the text that calibrates the weights. Raises CalibrationError."""
        source = self.streamed.source
        if not self.method.scheme().is_calibrated:
            return
        if isinstance(given, Tensor):
            self.windows, self.plan["calibration"] = given.long().cpu(), _described("tokens", given.long(), None)
            return
        given = given or CalibrationData()
        seqlen = window_of(self.wanted, source.config)
        text = replace(given, samples=self.wanted.samples, seqlen=seqlen)
        self.windows = calibration_windows(source, text, str(self.streamed.device), progress)
        self.plan["calibration"] = _described(text.source, self.windows, text.seed)

    def write(self, folder: Path, progress: Progress) -> None:
        """Calibrate the model as the folder has it, and add what was found."""
        found = KVCalibration(self.method, ())
        if self.windows is not None:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            device, trusted = str(self.streamed.device), self.streamed.source.trust_remote_code
            live = read_folder(folder, config, device=device, dense=True, trust_remote_code=trusted)
            found = calibrated(live, self.method, self.windows, self.plan["calibration"], progress)
        write_calibration(folder, found)


class PackedCacheEvaluator:
    """A model's answers through the packed cache, for a measurement; calibrated first where that is missing."""

    def __init__(
        self, model: nn.Module, wanted: KVConfig, reading: TextWindows, text: str, split: str, progress: Progress
    ) -> None:
        self.method, found = resolve_method(model, wanted)
        self.calibration: str | None = None
        self.on_own_text = False
        if self.method.scheme().is_calibrated:
            self.calibration = "folder"
            if found is None:
                length = window_of(wanted, getattr(model, "config", None))
                windows = reading.calibration(wanted.samples, length, 0)
                self.calibration = f"{text}, calib split, {wanted.samples} x {length} tokens"
                found = calibrated(model, self.method, windows, _described(text, windows, 0), progress)
            self.on_own_text = split != "eval" and found.about.get("source") == text
        self.device, self.rows = next(model.parameters()).device, 1
        self.answers = PackedCacheLogits(model, self.method, found)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits of tokens (windows, length)."""
        self.rows = len(tokens)
        return self.answers(tokens.to(self.device))

    def measured(self) -> dict[str, Any]:
        """What is to be said of the cache beside the figures of the model."""
        bits, size = self.answers.bits_per_element, self.answers.bytes
        told = {"kv_calibration": self.calibration, "kv_bits_per_element": bits, "kv_bytes": size // self.rows}
        return {
            **summary(self.method),
            **told,
            "kv_table_bytes": self.answers.table_bytes,
            "kv_on_calibration_text": self.on_own_text,
        }


def _described(source: str, windows: Tensor, seed: int | None) -> dict[str, Any]:
    samples, seqlen = windows.shape
    about = {"source": source, "samples": samples, "seqlen": seqlen, "sha256": windows_hash(windows.cpu())}
    return about if seed is None else {**about, "seed": seed}


def calibrated(
    model: nn.Module, method: KVMethod, windows: Tensor, about: dict[str, Any], progress: Progress | None = None
) -> KVCalibration:
    """What the method needs to know of a model, float or packed, from token windows (samples, length).

    Gradients go through decoded weights, so that a packed model is unpacked beside itself.
    """
    if any(isinstance(module, PackedMatrix) for module in model.modules()):
        model = dequantize_model(copy.deepcopy(model))
    device = next(model.parameters()).device
    found = calibrate(model, method, windows.to(device), progress)
    return replace(found, about=about)  # no time: equal jobs give equal bytes


def load_calibration(model: nn.Module) -> KVCalibration | None:
    """What lies in the folder that a model was loaded from."""
    folder = getattr(model, "name_or_path", "") or ""
    return read_calibration(Path(folder)) if folder else None


def resolve_method(model: nn.Module, wanted: KVConfig, name: str = "") -> tuple[KVMethod, KVCalibration | None]:
    """The method that is meant, and its calibration if the folder has that very one. Raises UsageError."""
    found = load_calibration(model)
    method = wanted.method(found)
    check(model, method, name)
    return method, found if found is not None and found.method == method else None


class CacheFactory:
    """Caches that text is generated with: what is asked for, or else what the model's folder was calibrated for.

    method: None for the model's own caches.  chunk: tokens of a prompt to read at a time, None for all at once.
    Raises UsageError for a method that lacks its calibration.
    """

    def __init__(self, model: nn.Module, wanted: KVConfig | None, name: str) -> None:
        self.model, self.chunk = model, None
        self.method, self.calibration = _chosen(model, wanted, name)
        if self.method is not None:
            config: Any = model.config
            layers = config.get_text_config().num_hidden_layers
            # not all hybrids of transformers continue their other states by several tokens exactly: Bamba does not
            self.chunk = PROMPT_CHUNK if len(packed_shapes(model)) == layers else None

    def new(self) -> QuantizedCache | None:
        """An empty cache."""
        if self.method is None:
            return None
        return QuantizedCache(self.model, self.method, calibration=self.calibration)

    def measured(self, cache: QuantizedCache | None) -> dict[str, Any]:
        """What is to be said of one that is full; nothing of the model's own."""
        if self.method is None or cache is None:
            return {}
        taken = {"kv_bits_per_element": cache.bits_per_element, "kv_bytes": cache.allocated_bytes}
        return {**summary(self.method), **taken, "kv_table_bytes": cache.table_bytes}


def _chosen(model: nn.Module, wanted: KVConfig | None, name: str) -> tuple[KVMethod | None, KVCalibration | None]:
    if wanted is None:
        found = load_calibration(model)
        if found is not None:
            check(model, found.method, name)
        return (found.method, found) if found else (None, None)
    if wanted.name == FLOAT:
        return None, None
    method, own = resolve_method(model, wanted, name)
    if method.scheme().is_calibrated and own is None:
        raise UsageError(
            f"{name} has no calibration for {describe(method)}; "
            f"make one by {calibration_command(method, name, load_calibration(model))}."
        )
    return method, own


def add_to_folder(
    folder: Path,
    out: Path,
    wanted: KVConfig,
    given: CalibrationData | Tensor | None,
    device: str,
    trust_remote_code: bool,
    progress: Progress,
) -> None:
    """Calibrate a folder that bitmill wrote, in place or, where `out` is another one, a copy of it."""
    if out != folder:
        check_new(out)
    progress.start("reading text and model", 0)
    live = load(folder, device=device, dense=True, trust_remote_code=trust_remote_code)
    earlier = load_calibration(live)
    method = wanted.method(earlier)
    kv, found = plan(live, method, str(folder)), KVCalibration(method, ())
    if method.scheme().is_calibrated:
        if isinstance(given, Tensor):
            raise UsageError(f"Token windows cannot calibrate {folder}; name a text, as CalibrationData.")
        text = given or CalibrationData()
        if text.source == SELF:
            raise UsageError(f"{folder} cannot write the text that calibrates it; give another one with --calib.")
        tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        text_windows = task_for(live.config).windows(text.source, tokenizer)
        windows = text_windows.calibration(wanted.samples, window_of(wanted, live.config), text.seed)
        kv["calibration"] = _described(text.source, windows, text.seed)
        found = calibrated(live, method, windows, kv["calibration"], progress)
    if out == folder:
        if earlier is not None:
            progress.note(f"replaces the calibration for {describe(earlier.method)}")
        record_calibration(folder, found, kv)
        return
    with writing(out):
        work = Path(shutil.copytree(folder, work_of(out)))
    record_calibration(work, found, kv)
    publish(work, out)
