"""Quantize a model: from arguments to a finished folder."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bitmill.calibration.token_windows import token_windows
from bitmill.checkpoint.files import folder_bytes
from bitmill.checkpoint.reader import Checkpoint, is_ours, open_checkpoint
from bitmill.checkpoint.writer import FolderSink, check_new, is_finished
from bitmill.data.windows import CalibrationData
from bitmill.errors import UsageError
from bitmill.kv.config import FLOAT, SAMPLES, parse_kv_config
from bitmill.models.embedding_and_head import embedding_and_head
from bitmill.models.streamed import StreamedModel
from bitmill.pipeline import Job, run
from bitmill.pipeline.in_place import ModuleSink
from bitmill.pipeline.job import Propagate
from bitmill.progress import Progress, peak_memory_bytes
from bitmill.recipes.recipe import Recipe
from bitmill.recipes.resolve import resolve_recipe
from bitmill.report.html import folder_documents
from bitmill.sources.open import open_source
from bitmill.version import __version__
from bitmill.workflows import kv as caching
from bitmill.workflows.checks import check_device, check_space, job_identity, settled_recipe
from bitmill.workflows.sizes import report_plan, storage_plan

SECONDS_DIGITS = 3
STORED = ("bits_per_weight", "head_bits_per_weight", "head_bytes", "unquantized_bytes")  # also in report.json


@dataclass
class Outcome:
    """What `quantize` did. `model` is set for a live module, `out` for a folder."""

    summary: dict[str, Any]
    report: dict[str, Any]
    out: Path | None = None
    model: nn.Module | None = field(default=None, repr=False)


def quantize(
    model: str | Path | nn.Module,
    method: str | Path | Recipe | None = None,
    *,
    out: str | Path | None = None,
    calibration: CalibrationData | Tensor | None = None,
    measure: int = 4,
    device: str = "cpu",
    resume: bool = False,
    dry_run: bool = False,
    propagate: Propagate = "quantized",
    statistics: str | Path | None = None,
    head_bits: int | None = None,
    kv: str | None = None,
    kv_bits: int | None = None,
    kv_options: dict[str, Any] | None = None,
    kv_samples: int = SAMPLES,
    kv_seqlen: int | None = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Outcome:
    """Quantize a model with a named method, a recipe file or a `Recipe`.

    model: a demo model's name, a Hugging Face folder or hub id, a .gguf file, or a live module.
    method: without one, the leader of the leaderboard at these bits; `summary["chosen"]` says which, and why.
        "none" leaves the weights as they are, for a KV method alone; a folder of bitmill's will do then.
    out: the folder to write; without it, a live module is quantized in place, once every layer is done, and with
        method "none" a folder of bitmill's is given its calibration in place.
    calibration: text to calibrate on, or token windows (samples, seqlen) for a live module without tokenizer.
    measure: held-out windows of the same text to measure on while quantizing; 0 measures nothing.
    propagate: what later blocks are calibrated on: the quantized blocks' outputs, or the float model's.
    statistics: with propagate="float", a folder that keeps the statistics for further recipes.
    head_bits: of embedding and output head, 8, 6 or 4; they stay in float without it.
    kv, kv_bits, kv_options: method of keys and values that the folder is to be used with, and is calibrated for
        on `kv_samples` windows of `kv_seqlen` tokens (2048, or as many as the model reads) of the same text.
    options: options of the method, such as bits=3, group_size="row".

    Raises BitmillError subclasses, each with one sentence.
    """
    started = time.perf_counter()
    if measure < 0:
        raise UsageError(f"measure is {measure}; use 0 or a positive number of windows.")
    wanted = parse_kv_config(kv, kv_bits, kv_options, kv_samples, kv_seqlen)
    folder = Path(out) if out is not None else None
    progress = progress or Progress()
    recipe: Recipe | None = None
    chosen: dict[str, str] = {}
    if method != FLOAT:
        recipe, chosen = settled_recipe(method, options, head_bits)
    elif wanted is None or options or head_bits:
        raise UsageError(
            "The method 'none' leaves weights as they are; name a KV method and no option of weights."
        )
    elif not isinstance(model, nn.Module) and is_ours(Path(model)) and not dry_run:
        check_device(device)
        written = folder or Path(model)
        caching.add_to_folder(Path(model), written, wanted, calibration, device, trust_remote_code, progress)
        return _found(open_checkpoint(written), {}, started)
    if folder is None and not dry_run and (wanted is not None or not isinstance(model, nn.Module)):
        raise UsageError("Nowhere to write: give an output folder with -o (out=...).")
    check_device(device)
    progress.start("opening the model", 0)
    source = open_source(model, trust_remote_code=trust_remote_code, tokenizer=tokenizer)
    if out is not None and isinstance(model, nn.Module) and not source.config.model_type:
        raise UsageError(
            f"{type(model).__name__} has no transformers config (no model_type), so no folder of it could be "
            "loaded again; leave out=... away to quantize it in place."
        )
    streamed = StreamedModel(source, device)
    keeping = caching.KVCalibrationJob(wanted, streamed) if wanted is not None else None
    kv_plan = keeping.plan if keeping else None
    resolved = None if recipe is None else resolve_recipe(recipe, streamed)
    plan = {
        **chosen,
        **storage_plan(streamed, resolved, kv_plan["size_bytes"] if kv_plan else 0),
        "kv": kv_plan,
    }
    if dry_run:
        return Outcome({**plan, "dry_run": True, "out": str(out) if out else None}, {})
    if folder is not None and not resume:
        check_new(folder)  # before text is read, or written by the model itself
    progress.start("reading text and model", 0)
    calib, held_out, described = token_windows(
        source, calibration, bool(recipe and recipe.needs), measure if recipe else 0, device, progress
    )
    if keeping:
        keeping.read(calibration, progress)
    identity = job_identity(source, recipe, calib, held_out, described, device, propagate, kv_plan)
    report: dict[str, Any] = {
        "bitmill": __version__,
        "source": source.name,
        "recipe": recipe.to_dict() if recipe is not None else None,
        "identity": identity,
        **{key: plan[key] for key in STORED},
        "ends": embedding_and_head(streamed).to_dict() if recipe is not None and recipe.head else None,
        "auto_class": streamed.task.auto_class_name,
        **({"kv": kv_plan} if kv_plan else {}),
    }
    sink: FolderSink | ModuleSink
    if folder is not None:
        if resume and is_finished(folder, identity):
            return _found(open_checkpoint(folder), plan, started)
        check_space(folder, plan["size_bytes"])
        sink = FolderSink(folder, recipe, identity, len(streamed.blocks), resume)
    else:
        assert isinstance(model, nn.Module)
        sink = ModuleSink(model)
    try:
        quality: dict[str, Any] = {}
        if recipe is not None:
            shared = Path(statistics) if statistics is not None else None
            quality = run(Job(streamed, recipe, calib, held_out, propagate, shared), sink, progress)
        elif isinstance(sink, FolderSink):
            sink.keep(streamed, progress)
        measured = [{"by": "quantize", **described["held_out"], **quality}] if quality else []
        report["measured"] = measured
        report["layers"] = sink.layers
        if isinstance(sink, FolderSink):
            written = sink.complete(streamed)
            if keeping:
                keeping.write(written, progress)
            sink.finish(report, folder_documents(report))
        else:
            sink.finish()
    finally:
        if isinstance(sink, FolderSink):
            sink.close()
    live = model if isinstance(model, nn.Module) and folder is None else None
    return Outcome(_summary(plan, folder, started, measured), report, folder, live)


def _found(checkpoint: Checkpoint, plan: dict[str, Any], started: float) -> Outcome:
    """The outcome of a folder that is there, as planned or, without a plan, as it says itself."""
    report = checkpoint.report
    plan = plan or {**report_plan(checkpoint), "kv": report.get("kv")}
    return Outcome(_summary(plan, checkpoint.folder, started, report["measured"]), report, checkpoint.folder)


def _summary(plan: dict[str, Any], out: Path | None, started: float, measured: list[Any]) -> dict[str, Any]:
    return {
        **plan,
        "size_bytes": folder_bytes(out) if out else plan["size_bytes"],
        "measured": measured,
        "out": str(out) if out else None,
        "time_s": round(time.perf_counter() - started, SECONDS_DIGITS),
        "peak_memory_bytes": peak_memory_bytes(),
    }
