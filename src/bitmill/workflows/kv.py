"""KV methods in the workflows: resolved, calibrated, written into a folder, measured and generated with."""

from __future__ import annotations

import copy
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bitmill.calibration.token_windows import calibration_windows
from bitmill.checkpoint.overwrite import new_folder
from bitmill.checkpoint.record import add_calibration, check_recordable, record_calibration
from bitmill.config.documents import load_json
from bitmill.data.text import windows_hash
from bitmill.data.windows import SELF, CalibrationData, TextWindows, check_context_length, check_vocabulary
from bitmill.errors import UsageError
from bitmill.evaluation.context import context_length, text_config
from bitmill.evaluation.generate import PROMPT_CHUNK
from bitmill.evaluation.logits import Output
from bitmill.files import output_errors
from bitmill.kv.cache import PackedForward, QuantizedCache
from bitmill.kv.calibrate import calibrate, check_windows
from bitmill.kv.calibration_file import KVCalibration, load_calibration, matching_calibration
from bitmill.kv.config import FLOAT, KVConfig
from bitmill.kv.scheme import KVMethod
from bitmill.kv.size import calibration_bytes, check_method, packed_layers, page_bits
from bitmill.models.streamed import StreamedModel
from bitmill.progress import Progress
from bitmill.runtime.modules.dequantize import dequantize_model
from bitmill.runtime.modules.packed import PackedMatrix
from bitmill.tasks.base import task_for
from bitmill.workflows.load import load, load_tokenizer, read_folder

SEQLEN = 2048


def window_length(config: KVConfig, model_config: Any) -> int:
    """Return the tokens of a calibration window.

    Args:
        config: KV option.
        model_config: transformers config of the model.

    Raises:
        CalibrationError: more tokens are requested than the model reads.
    """
    if config.seqlen is not None:
        check_context_length(model_config, config.seqlen, "--kv-seqlen")
        return config.seqlen
    limit = context_length(model_config)
    return SEQLEN if limit is None else min(SEQLEN, limit)


def method_plan(model: nn.Module, method: KVMethod, name: str = "") -> dict[str, Any]:
    """Return the entry of reports and summaries for a method, before it is calibrated.

    Args:
        model: a decoder; parameters on the meta device suffice.
        method: KV method.
        name: of the model, for error messages.

    Raises:
        UsageError, RecipeError: the method cannot store the model's keys and values.
    """
    check_method(model, method, name)
    return {
        "method": method.to_dict(),
        "bits_per_element": page_bits(model, method),
        "size_bytes": calibration_bytes(model, method),
        "calibration": None,
    }


def resolve_method(model: nn.Module, config: KVConfig, name: str = "") -> tuple[KVMethod, KVCalibration | None]:
    """Return the method of a KV option for a model, and the calibration in the model's folder, of any method.

    Args:
        model: a decoder.
        config: KV option; options that were not given are those of the folder's calibration.
        name: of the model, for error messages.

    Raises:
        UsageError, RecipeError: the method is unknown, or cannot store the model's keys and values.
    """
    found = load_calibration(model)
    method = config.method(found)
    check_method(model, method, name)
    return method, found


def calibrate_on(
    model: nn.Module,
    method: KVMethod,
    windows: Tensor,
    about: dict[str, Any],
    progress: Progress | None = None,
) -> KVCalibration:
    """Calibrate a method for a model with float or packed weights.

    Gradients pass through decoded weights: a packed model is decoded into a copy.

    Args:
        model: a decoder.
        method: KV method.
        windows: token windows (samples, length).
        about: description of the windows, for the calibration.
        progress: observer.

    Returns:
        Calibration, without times: equal jobs give equal bytes.
    """
    if any(isinstance(module, PackedMatrix) for module in model.modules()):
        model = dequantize_model(copy.deepcopy(model))
    device = next(model.parameters()).device
    return replace(calibrate(model, method, windows.to(device), progress), about=about)


class KVCalibrationJob:
    """Calibration of a KV method while a model is quantized into a new folder.

    Args:
        config: KV option.
        streamed: the model.

    Attributes:
        plan: entry of report and summary for the method.

    Raises:
        UsageError, RecipeError: the method cannot store the model's keys and values.
    """

    def __init__(self, config: KVConfig, streamed: StreamedModel) -> None:
        self.config, self.streamed, self.method = config, streamed, config.method()
        self.plan = method_plan(streamed.model, self.method, streamed.source.name)
        self.windows: Tensor | None = None

    def prepare(self, given: CalibrationData | Tensor | None, progress: Progress) -> None:
        """Read the calibration windows of the method, if it needs any.

        Args:
            given: calibration of the weights: its text is used, or its token windows (samples, length).
            progress: observer.

        Raises:
            CalibrationError: there are too few tokens, or more than the model reads.
        """
        source = self.streamed.source
        if not self.method.scheme().is_calibrated:
            return
        if isinstance(given, Tensor):
            check_windows(given)
            self.windows, self.plan["calibration"] = given.long().cpu(), _about("tokens", given.long(), None)
            return
        given = given or CalibrationData()
        seqlen = window_length(self.config, source.config)
        text = replace(given, samples=self.config.samples, seqlen=seqlen)
        self.windows, cut = calibration_windows(source, text, str(self.streamed.device), progress)
        check_windows(self.windows)
        self.plan["calibration"] = {**_about(text.name, self.windows, text.seed), **cut}

    def write(self, folder: Path, progress: Progress) -> None:
        """Calibrate the model in a folder, with its weights as written, and write the calibration there.

        Args:
            folder: finished folder of the model.
            progress: observer.
        """
        calibration = KVCalibration(self.method, ())
        if self.windows is not None:
            config = load_json((folder / "config.json").read_text(encoding="utf-8"))
            device, trusted = str(self.streamed.device), self.streamed.source.trust_remote_code
            live = read_folder(folder, config, device=device, dense=True, trust_remote_code=trusted)
            calibration = calibrate_on(live, self.method, self.windows, self.plan["calibration"], progress)
        calibration.save(folder)


class PackedCacheEvaluator:
    """Logits of a model through the packed cache, for a measurement; calibrated first if the folder has none.

    Args:
        model: a decoder.
        config: KV option.
        reading: tokenized text, for the calibration.
        text: name of the text.
        split: of the text that is measured on.
        progress: observer.
    """

    def __init__(
        self, model: nn.Module, config: KVConfig, reading: TextWindows, text: str, split: str, progress: Progress
    ) -> None:
        self.method, found = resolve_method(model, config)
        self.calibration: str | None = None
        self.on_own_text = False
        if self.method.scheme().is_calibrated:
            self.calibration = "folder"
            if found is None or found.method != self.method:
                length = window_length(config, getattr(model, "config", None))
                windows = reading.calibration(config.samples, length, 0)
                check_vocabulary(getattr(model, "config", None), windows)
                self.calibration = f"{text}, calib split, {config.samples} x {length} tokens"
                found = calibrate_on(model, self.method, windows, _about(text, windows, 0), progress)
            self.on_own_text = split != "eval" and found.about.get("source") == text
        self.device, self.rows = next(model.parameters()).device, 1
        self.forward = PackedForward(model, self.method, found)

    def __call__(self, tokens: Tensor) -> Output:
        """Return the logits of tokens (windows, length)."""
        self.rows = len(tokens)
        return self.forward(tokens.to(self.device))

    def measurements(self) -> dict[str, Any]:
        """Return the figures of the cache after the last windows, for the result of the measurement."""
        return {
            **_method_summary(self.method),
            "kv_calibration": self.calibration,
            "kv_bits_per_element": self.forward.bits_per_element,
            "kv_bytes": self.forward.bytes // self.rows,
            "kv_table_bytes": self.forward.table_bytes,
            "kv_on_calibration_text": self.on_own_text,
        }


class CacheFactory:
    """Factory of caches to generate text with.

    Args:
        model: a decoder.
        config: KV option; None for the method that the model's folder was calibrated for.
        name: of the model, for error messages.

    Attributes:
        method: None for the model's own caches.
        chunk: tokens of a prompt to read at a time, None for all at once.
        continues: True where several tokens continue a filled cache exactly.

    Raises:
        UsageError: the method lacks its calibration, or cannot store the model's keys and values.
    """

    def __init__(self, model: nn.Module, config: KVConfig | None, name: str) -> None:
        self.model: nn.Module = model
        self.chunk: int | None = None
        self.method, self.calibration = _method_to_generate_with(model, config, name)
        self.continues = can_continue_cache(model)
        if self.method is not None and self.continues:
            self.chunk = PROMPT_CHUNK

    def new(self) -> QuantizedCache | None:
        """Return an empty cache; None for the model's own."""
        if self.method is None:
            return None
        return QuantizedCache(self.model, self.method, calibration=self.calibration)

    def measurements(self, cache: QuantizedCache | None) -> dict[str, Any]:
        """Return the figures of a filled cache; none for the model's own."""
        if self.method is None or cache is None:
            return {}
        return {
            **_method_summary(self.method),
            "kv_bits_per_element": cache.bits_per_element,
            "kv_bytes": cache.allocated_bytes,
            "kv_table_bytes": cache.table_bytes,
        }


def can_continue_cache(model: nn.Module) -> bool:
    """Return True if several tokens continue a filled cache exactly: every layer keeps keys and values.

    Not all hybrids of transformers continue their other states by several tokens exactly: Bamba does not.
    """
    config: Any = getattr(model, "config", None)
    layers = packed_layers(config)
    return bool(layers) and len(layers) == getattr(text_config(config), "num_hidden_layers", None)


def _method_to_generate_with(
    model: nn.Module, config: KVConfig | None, name: str
) -> tuple[KVMethod | None, KVCalibration | None]:
    if config is None:
        found = load_calibration(model)
        if found is None:
            return None, None
        check_method(model, found.method, name)
        return found.method, found
    if config.name == FLOAT:
        return None, None
    method, found = resolve_method(model, config, name)
    return method, matching_calibration(method, found, name)


def calibrate_folder(
    folder: Path,
    out: Path,
    config: KVConfig,
    given: CalibrationData | Tensor | None,
    device: str,
    trust_remote_code: bool,
    progress: Progress,
    overwrite: bool = False,
) -> None:
    """Calibrate a folder that bitmill wrote, in place or, where `out` is another folder, a copy of it.

    Args:
        folder: with a quantized or float model.
        out: folder to write.
        config: KV option.
        given: calibration text; token windows are refused.
        device: to calibrate on.
        trust_remote_code: load code in the model's folder.
        progress: observer.
        overwrite: replace `out` if bitmill wrote it.

    Raises:
        UsageError: `given` cannot calibrate a folder, or the method cannot store the model's keys and values.
        OutputError: the folder cannot be written.
    """
    if out.resolve() == folder.resolve():
        files = check_recordable(folder)
        calibration, plan = _calibrated(folder, config, given, device, trust_remote_code, progress)
        record_calibration(folder, calibration, plan, files)
        return
    if out.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"{out} lies in {folder}, of which it would be a copy; choose another folder with -o.")
    with new_folder(out, overwrite) as work:
        calibration, plan = _calibrated(folder, config, given, device, trust_remote_code, progress)
        with output_errors(out):
            shutil.copytree(folder, work.model, ignore_dangling_symlinks=True)
        add_calibration(work.model, calibration, plan)


def _calibrated(
    folder: Path,
    config: KVConfig,
    given: CalibrationData | Tensor | None,
    device: str,
    trust_remote_code: bool,
    progress: Progress,
) -> tuple[KVCalibration, dict[str, Any]]:
    """Return the calibration of a folder that bitmill wrote, and the report's entry on it."""
    progress.start("reading text and model", 0)
    live = load(folder, device=device, dense=True, trust_remote_code=trust_remote_code)
    earlier = load_calibration(live)
    method = config.method(earlier)
    plan, calibration = method_plan(live, method, str(folder)), KVCalibration(method, ())
    if method.scheme().is_calibrated:
        text = _folder_text(folder, given)
        tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        text_windows = task_for(live.config).windows(text.source, tokenizer)
        windows = text_windows.calibration(config.samples, window_length(config, live.config), text.seed)
        check_vocabulary(live.config, windows)
        cut = text_windows.describe("calib", config.samples)
        plan["calibration"] = {**_about(text.name, windows, text.seed), **cut}
        calibration = calibrate_on(live, method, windows, plan["calibration"], progress)
    if earlier is not None:
        progress.note(f"replaces the calibration for {earlier.method.describe()}")
    return calibration, plan


def _folder_text(folder: Path, given: CalibrationData | Tensor | None) -> CalibrationData:
    if isinstance(given, Tensor):
        raise UsageError(f"Token windows cannot calibrate {folder}; name a text, as CalibrationData.")
    text = given or CalibrationData()
    if text.source == SELF:
        raise UsageError(f"{folder} cannot write its own calibration text; give another one with --calib.")
    return text


def _method_summary(method: KVMethod) -> dict[str, Any]:
    """Return a method and its options under the keys of results."""
    return {"kv_method": method.name, "kv_options": {f.name: getattr(method, f.name) for f in fields(method)}}


def _about(source: str, windows: Tensor, seed: int | None) -> dict[str, Any]:
    """Return the description of calibration windows (samples, length), for the calibration's metadata."""
    samples, seqlen = windows.shape
    about = {"source": source, "samples": samples, "seqlen": seqlen, "sha256": windows_hash(windows.cpu())}
    return about if seed is None else {**about, "seed": seed}
