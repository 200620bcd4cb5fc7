"""The Python interface: quantize, load, evaluate."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bitmill.checkpoint import FolderSink, open_checkpoint
from bitmill.checkpoint.files import folder_bytes
from bitmill.checkpoint.reader import is_checkpoint
from bitmill.checkpoint.writer import check_new, is_finished
from bitmill.errors import BitmillError, CheckpointError, UsageError
from bitmill.evaluation.judge import judge_of
from bitmill.evaluation.perplexity import compare
from bitmill.live import ModuleSink, evaluating
from bitmill.models.adapter import is_encoder
from bitmill.models.calls import answers_of
from bitmill.models.ends import ends_of
from bitmill.models.meta import auto_class
from bitmill.models.pooling import MEAN, pooling_of, read_pooling
from bitmill.models.reading import reading_of, windows_of
from bitmill.models.skeleton import Skeleton
from bitmill.models.source import in_short, open_source
from bitmill.pipeline import Job, run
from bitmill.pipeline.job import Propagate
from bitmill.preparation import (
    Calibration,
    check_device,
    check_length,
    check_space,
    job_identity,
    settled_recipe,
    token_windows,
)
from bitmill.progress import Progress, peak_memory_bytes
from bitmill.recipe import Recipe
from bitmill.report.html import folder_documents
from bitmill.runtime.decode import attach
from bitmill.runtime.dense import densify
from bitmill.sizes import storage_plan, stored_bits
from bitmill.version import __version__

SECONDS_DIGITS = 3
STORED = ("bits_per_weight", "head_bits_per_weight", "head_bytes", "unquantized_bytes")  # also in report.json
_SENTENCES = 32  # run at a time, of one length


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
    calibration: Calibration | Tensor | None = None,
    measure: int = 4,
    device: str = "cpu",
    resume: bool = False,
    dry_run: bool = False,
    propagate: Propagate = "quantized",
    statistics: str | Path | None = None,
    head_bits: int | None = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Outcome:
    """Quantize a model with a named method, a recipe file or a `Recipe`.

    model: a demo model's name, a Hugging Face folder or hub id, a .gguf file, or a live module.
    method: without one, the leader of the leaderboard at these bits; `summary["chosen"]` says which, and why.
    out: the folder to write; without it, a live module is quantized in place, once every layer is done.
    calibration: text to calibrate on, or token windows (samples, seqlen) for a live module without tokenizer.
    measure: held-out windows of the same text to measure on while quantizing; 0 measures nothing.
    propagate: what later blocks are calibrated on: the quantized blocks' outputs, or the float model's.
    statistics: with propagate="float", a folder that keeps the statistics for further recipes.
    head_bits: of embedding and output head, 8, 6 or 4; they stay in float without it.
    options: options of the method, such as bits=3, group_size="row".

    Raises BitmillError subclasses, each with one sentence.
    """
    started = time.perf_counter()
    if measure < 0:
        raise UsageError(f"measure is {measure}; use 0 or a positive number of windows.")
    recipe, chosen = settled_recipe(method, options, head_bits)
    if out is None and not isinstance(model, nn.Module) and not dry_run:
        raise UsageError("Nowhere to write: give an output folder with -o (out=...).")
    check_device(device)
    progress = progress or Progress()
    progress.start("opening the model", 0)
    source = open_source(model, trust_remote_code=trust_remote_code, tokenizer=tokenizer)
    if out is not None and isinstance(model, nn.Module) and not source.config.model_type:
        raise UsageError(
            f"{type(model).__name__} has no transformers config (no model_type), so no folder of it could be "
            "loaded again; leave out=... away to quantize it in place."
        )
    skeleton = Skeleton(source, device)
    plan = {**chosen, **storage_plan(skeleton, recipe)}
    if dry_run:
        return Outcome({**plan, "dry_run": True, "out": str(out) if out else None}, {})
    folder = Path(out) if out is not None else None
    if folder is not None and not resume:
        check_new(folder)  # before text is read, or written by the model itself
    progress.start("reading text and model", 0)
    calib, held_out, described = token_windows(source, calibration, recipe, measure, device, progress)
    identity = job_identity(source, recipe, calib, held_out, described, device, propagate)
    report: dict[str, Any] = {
        "bitmill": __version__,
        "source": source.name,
        "recipe": recipe.to_dict(),
        "identity": identity,
        **{key: plan[key] for key in STORED},
        "ends": ends_of(skeleton).to_dict() if recipe.head else None,
        "auto_class": auto_class(source.config).__name__,
    }
    sink: FolderSink | ModuleSink
    if folder is not None:
        if resume and is_finished(folder, identity):
            done = open_checkpoint(folder)
            return Outcome(_summary(plan, folder, started, done.report["measured"]), done.report, folder)
        check_space(folder, plan["size_bytes"])
        sink = FolderSink(folder, recipe, identity, len(skeleton.blocks), resume)
    else:
        assert isinstance(model, nn.Module)
        sink = ModuleSink(model)
    try:
        shared = Path(statistics) if statistics is not None else None
        quality = run(Job(skeleton, recipe, calib, held_out, propagate, shared), sink, progress)
        measured = [{"by": "quantize", **described["held_out"], **quality}] if quality else []
        report["measured"] = measured
        report["layers"] = sink.layers
        if isinstance(sink, FolderSink):
            sink.finish(skeleton, report, folder_documents(report))
        else:
            sink.finish()
    finally:
        if isinstance(sink, FolderSink):
            sink.close()
    live = model if isinstance(model, nn.Module) and folder is None else None
    return Outcome(_summary(plan, folder, started, measured), report, folder, live)


def load(
    model: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    dense: bool = False,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a quantized folder, or any float model, ready to run; quantized weights stay packed.

    dtype: type of activations and unquantized weights.
    dense: unpack all weights, for an ordinary model with a float model's memory.
    """
    check_device(device)
    if isinstance(model, (str, Path)) and is_checkpoint(Path(model)):
        config = open_checkpoint(model).config  # refuses damage before anything is read
        loaded, info = _from_folder(
            auto_class(config), model, trust_remote_code, dtype=dtype, output_loading_info=True
        )
        if absent := sorted([*info["missing_keys"], *info["mismatched_keys"]], key=str):
            # transformers would go on with random numbers
            raise CheckpointError(f"{model} lacks the tensor {absent[0]!r} of its model; quantize it again.")
        return (densify(loaded, dtype) if dense else loaded).eval().to(device)
    skeleton = Skeleton(open_source(model, trust_remote_code=trust_remote_code), device)
    skeleton.load(skeleton.names())
    return attach(skeleton.model.to(dtype))


def load_tokenizer(model: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a quantized folder or of any float model."""
    if is_checkpoint(Path(model)):
        from transformers import AutoTokenizer

        return _from_folder(AutoTokenizer, model, trust_remote_code)
    return open_source(model, trust_remote_code=trust_remote_code).tokenizer()


def evaluate(
    model: str | Path | nn.Module,
    *,
    text_source: str = "pydoc",
    split: Literal["eval", "calib", "all"] = "eval",
    seqlen: int = 512,
    windows: int | None = 40,
    reference: str | Path | nn.Module | None = None,
    tokenizer: Any = None,
    device: str = "cpu",
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Perplexity on non-overlapping windows; with `reference`, KL divergence and top-1 agreement to it.

    An encoder is measured on the sentences in as much text, see `bitmill.evaluation.embedding`: pair_cosine, and
    with a reference cosine_similarity and neighbour_agreement.

    Returns plain data: perplexity, tokens, bits_per_weight, size_bytes, time_s, peak_memory_bytes, and with a
    reference kl_divergence (nats a token), top1_agreement and reference_perplexity.
    """
    started = time.perf_counter()
    if tokenizer is None:
        if isinstance(model, nn.Module):
            raise UsageError("A live model carries no tokenizer; pass tokenizer=... beside it.")
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    progress = progress or Progress()
    progress.start("reading text and model", 0)
    bits, size = stored_bits(model, trust_remote_code)
    pooling = _pooling(model, trust_remote_code)
    chosen = reading_of(text_source, tokenizer, encoder=pooling is not None).held_out(split, seqlen, windows)
    live = _live(model, device, trust_remote_code)
    other = None if reference is None else _live(reference, device, trust_remote_code)
    check_length(getattr(live, "config", None), seqlen)
    against, judge = None if other is None else answers_of(other), judge_of(pooling)
    batch = 2 if pooling is None else _SENTENCES
    with evaluating(live), evaluating(other):
        result = compare(answers_of(live), chosen, against, progress, batch, judge)
    return {
        **result,
        "bits_per_weight": bits,
        "size_bytes": size,
        "text": text_source,
        "split": split,
        "seqlen": seqlen,
        "windows": windows_of(chosen, seqlen),
        "time_s": round(time.perf_counter() - started, SECONDS_DIGITS),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _summary(plan: dict[str, Any], out: Path | None, started: float, measured: list[Any]) -> dict[str, Any]:
    return {
        **plan,
        "size_bytes": folder_bytes(out) if out else plan["size_bytes"],
        "measured": measured,
        "out": str(out) if out else None,
        "time_s": round(time.perf_counter() - started, SECONDS_DIGITS),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _live(model: str | Path | nn.Module, device: str, trust_remote_code: bool) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    return load(model, device=device, trust_remote_code=trust_remote_code)


def _from_folder(kind: Any, folder: str | Path, trust_remote_code: bool, **options: Any) -> Any:
    """What transformers reads from a folder that bitmill wrote, with one sentence for whatever it raises."""
    try:
        return kind.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, local_files_only=True, **options
        )
    except BitmillError:
        raise
    except Exception as error:  # transformers raises all sorts
        what = "tokenizer" if "Tokenizer" in kind.__name__ else "model"
        advice = "copy the folder again, or quantize the model again"
        if "trust_remote_code" in str(error):
            advice = "if you trust the Python code in it, pass --trust-remote-code (trust_remote_code=True)"
        raise CheckpointError(f"The {what} of {folder} cannot be loaded ({in_short(error)}); {advice}.") from error


def _pooling(model: str | Path | nn.Module, trust_remote_code: bool) -> str | None:
    """How the embeddings of an encoder are pooled; None for any other model."""
    if isinstance(model, nn.Module):
        return MEAN if is_encoder(getattr(model, "config", None)) else None
    if is_checkpoint(Path(model)):
        return read_pooling(Path(model)) if is_encoder(open_checkpoint(model).config) else None
    return pooling_of(open_source(model, trust_remote_code=trust_remote_code))
