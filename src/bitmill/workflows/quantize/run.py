"""Quantize a model: from arguments to a finished folder, or to a live module in place."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from bitmill.calibration.token_windows import JobData
from bitmill.checkpoint.overwrite import check_output, check_replaceable
from bitmill.checkpoint.reader import Checkpoint, is_bitmill_folder, open_checkpoint
from bitmill.checkpoint.schema import quantization_config
from bitmill.checkpoint.work_folder import SUFFIX_BYTES, WorkFolder, can_resume
from bitmill.checkpoint.writer import FolderSink, is_finished
from bitmill.config.arguments import checked_arguments, renamed_arguments
from bitmill.config.paths import user_path
from bitmill.data.windows import CalibrationData, as_calibration
from bitmill.errors import UsageError, one_line
from bitmill.evaluation.reference import FILE as REFERENCE_FILE
from bitmill.evaluation.reference import ReferencePredictions, ReferenceRecorder
from bitmill.files import folder_bytes, write_tensors
from bitmill.kv.config import FLOAT, SAMPLES, KVConfig, parse_kv_config
from bitmill.models.trial import try_block_kinds
from bitmill.pipeline import Job, run
from bitmill.pipeline.in_place import ModuleSink
from bitmill.pipeline.job import Propagate
from bitmill.progress import Progress, peak_memory_bytes
from bitmill.progress.terminal import displayed
from bitmill.recipes.attention import attach_attention
from bitmill.recipes.compose import HeadBits
from bitmill.recipes.method import Method
from bitmill.recipes.recipe import Recipe
from bitmill.recipes.rules import Rule
from bitmill.report.html import folder_documents
from bitmill.report.text import format_rows, next_commands, summary_rows
from bitmill.workflows import kv as kv_workflow
from bitmill.workflows.announce import announced
from bitmill.workflows.budget.peak import PeakNotMeasured, measured_peak
from bitmill.workflows.budget.run import BudgetRequest, recipe_for_budget
from bitmill.workflows.budget.size import parse_budget
from bitmill.workflows.checks import check_space
from bitmill.workflows.job_report import job_report
from bitmill.workflows.machine import seconds_since
from bitmill.workflows.prepare import (
    PreparedJob,
    QuantizeRequest,
    RecipeChanges,
    prepare_job,
    read_data,
    windows_to_measure,
    with_calibrated_attention,
    with_kv,
)
from bitmill.workflows.running import measure_folder
from bitmill.workflows.sizes import report_plan


@dataclass
class Outcome:
    """The result of `quantize`: `model` is set for a live module, `out` for a folder; `print` shows a summary.

    name: the float model as given, or the class of a live module.
    """

    summary: dict[str, Any]
    report: dict[str, Any]
    out: Path | None = None
    model: nn.Module | None = field(default=None, repr=False)
    name: str = ""

    def rows(self) -> list[tuple[str, str]]:
        """Return the summary as (name, value) pairs to print, with what can be done next."""
        commands = []
        if self.out is not None and self.report.get("auto_class"):
            chat = (self.out / "chat_template.jinja").is_file()
            commands = next_commands(self.name, str(self.out), self.report["auto_class"], chat)
        return summary_rows(self.name, self.summary, commands)

    def __str__(self) -> str:
        rows = self.rows()
        return format_rows(rows)


@renamed_arguments(calibration="calib")
@checked_arguments("calib", "progress", "head_bits")
def quantize(
    model: str | Path | nn.Module,
    method: str | Path | Recipe | Method | None = None,
    *,
    out: str | Path | None = None,
    calib: CalibrationData | Tensor | str | Path | list[str] | None = None,
    measure: int | None = None,
    device: str = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    propagate: Propagate = "quantized",
    statistics: str | Path | None = None,
    head_bits: HeadBits | None = None,
    rules: Sequence[str | Rule] = (),
    budget: str | None = None,
    methods: Sequence[str | Recipe] | None = None,
    sensitivity: str | None = None,
    allocator: str | None = None,
    max_minutes: float | None = None,
    corrections: int | None = None,
    save_recipe: str | Path | None = None,
    ray: str | None = None,
    kv: str | None = None,
    kv_bits: int | None = None,
    kv_options: dict[str, Any] | None = None,
    kv_samples: int = SAMPLES,
    kv_seqlen: int | None = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    progress: Progress | bool | None = None,
    **options: Any,
) -> Outcome:
    """Quantize a model with a named method, a recipe file, a `Method` or a `Recipe`.

    Args:
        model: the name of a demo model, a Hugging Face folder or hub id, a .gguf file, or a live module.
        method: by default the leader of the leaderboard at these bits, which `summary["chosen"]` explains. "none"
            leaves the weights as they are, for a KV method alone, also in a folder that bitmill wrote.
        out: the folder to write. Without it a live module, or the KV calibration of a folder, changes in place.
        calib: text to calibrate on, its source alone (such as "pydoc"), a list of texts, or token windows
            (samples, seqlen) for a live module without tokenizer.
        resume: continue an interrupted run.
        overwrite: replace a folder that bitmill wrote, once the new one is complete.
        dry_run: compute sizes and bits, and write nothing.
        measure: number of held-out windows to measure on; 4 without it, of suite and mix 1 of each domain.
        propagate: input of later blocks during calibration, of the quantized blocks or of the float model.
        statistics: with propagate="float", a folder that keeps the statistics for further recipes.
        head_bits: bits of embedding and output head, 8, 6 or 4, or "float"; 8 by default, see docs/cli.md.
        rules: exceptions for some layers, such as "*.down_proj=uniform:bits=8"; the first match wins.
        budget: choose a format for every layer so that the model takes no more: "3.0bpw" are bits per weight of
            the blocks, "70MB" the files of weights, "40ms prompts of 512" and "25 tokens/s" the measured time of
            the blocks' linear layers, "8GB at 32k context" the memory of the running model, with
            bits of keys and values chosen too, stored by the method `kv` (kivi). The last eighth of the
            calibration windows, 16 at most, verifies the choice.
        methods: with a budget, names of methods, recipe files or recipes to choose from.
        sensitivity, allocator: with a budget, how the effect of a format on the model is measured, and how formats
            are chosen, see docs/budget.md.
        max_minutes: with a budget, about the longest time of the sensitivities; twice that of quantizing by
            default.
        corrections: with a budget, corrections of the choice, 0 to 2; 1 by default.
        save_recipe: with a budget, a file for the recipe, also with dry_run.
        ray: with a budget, measure sensitivities as tasks of a Ray cluster: "local" for one of this machine, or
            the address of another one, see docs/ray.md.
        kv, kv_bits, kv_options: the method of keys and values; it is calibrated on `kv_samples` windows of
            `kv_seqlen` tokens (by default 2048, or the model's context length) of the text.
        progress: where progress is reported; True displays it, which terminals and notebooks do; False is silent.
        options: options of the method, such as bits=3 or group_size="row".

    Raises:
        BitmillError: anything wrong with model, method, text or disk, in one sentence.
    """
    kv_config = parse_kv_config(kv, kv_bits, kv_options, kv_samples, kv_seqlen)
    calibration = as_calibration(calib)
    with displayed(progress) as shown:
        request = QuantizeRequest(
            model, None if out is None else user_path(out, SUFFIX_BYTES),
            calibration, windows_to_measure(measure, calibration), device, resume, overwrite, dry_run, propagate,
            None if statistics is None else user_path(statistics), kv_config, tokenizer, trust_remote_code, shown,
        )  # fmt: skip
        changes = RecipeChanges(options, head_bits, tuple(rules))
        asked = _budget_request(
            budget, methods, sensitivity, allocator, max_minutes, corrections, save_recipe, ray
        )
        outcome = (
            _quantize(request, method, changes) if asked is None else _to_budget(request, method, changes, asked)
        )
    outcome.name = type(model).__name__ if isinstance(model, nn.Module) else str(model)
    return outcome


def _budget_request(budget: str | None, *given: Any) -> BudgetRequest | None:
    """Return the arguments about a budget; None without one.

    Args:
        budget: the budget.
        given: the other fields of BudgetRequest in order, None where they were not given.

    Raises:
        UsageError: arguments about a budget without one, or wrong ones.
    """
    names = [field.name for field in fields(BudgetRequest)][1:]
    known = {name: value for name, value in zip(names, given, strict=True) if value is not None}
    if budget is None:
        if known:
            raise UsageError(f"{next(iter(known))} belongs to a budget; give one, such as budget='3.0bpw'.")
        return None
    if "save_recipe" in known:
        known["save_recipe"] = user_path(known["save_recipe"])
    return BudgetRequest(budget, **known)


def _to_budget(
    request: QuantizeRequest,
    method: str | Path | Recipe | Method | None,
    changes: RecipeChanges,
    asked: BudgetRequest,
) -> Outcome:
    """Quantize to a budget: by the recipe that is chosen for it, without the windows that verified it."""
    if method is not None or changes.options:
        given = "method" if method is not None else next(iter(changes.options))
        raise UsageError(
            f"A budget chooses methods and their options itself; leave out {given}, or name the methods to choose "
            "from with --methods (methods)."
        )
    request.check_output()
    found = recipe_for_budget(request, asked, changes.rules, changes.head_bits)
    request = replace(request, held_apart=found.held_apart, kv=None)
    return _write(with_kv(request, found.recipe), found.recipe, {"budget": found.summary})


def _quantize(
    request: QuantizeRequest, method: str | Path | Recipe | Method | None, changes: RecipeChanges
) -> Outcome:
    recipe: Recipe | None = None
    chosen: dict[str, str] = {}
    if method != FLOAT:
        recipe, chosen = changes.choose(method)
    elif request.kv is None or changes.given:
        raise UsageError(
            "The method 'none' leaves weights as they are; name a KV method and no option of weights."
        )
    elif not isinstance(request.model, nn.Module) and not request.dry_run:
        folder = user_path(request.model)
        if is_bitmill_folder(folder):
            return _calibrate_folder(request, folder, request.kv)
    request.check_output()
    return _write(with_kv(request, recipe), recipe, chosen)


def _write(request: QuantizeRequest, recipe: Recipe | None, chosen: dict[str, Any]) -> Outcome:
    """Quantize by a recipe.

    Args:
        request: the arguments of `quantize`.
        recipe: the recipe; None leaves the weights as they are.
        chosen: entries of the summary on how the recipe was chosen.
    """
    prepared = prepare_job(request, recipe, chosen)
    if request.dry_run:
        out = str(request.out) if request.out else None
        return Outcome({**prepared.plan, "dry_run": True, "out": out}, {})
    work = _work_folder(request)
    try:
        data, identity = read_data(prepared)
        if work is None and request.out is not None:
            if is_finished(request.out, identity):
                return _finished(open_checkpoint(request.out), prepared.plan, request.started)
            work = WorkFolder(request.out)  # the folder was moved away meanwhile
        prepared = with_calibrated_attention(prepared, data)
        return _run(announced(prepared, data, identity), data, identity, work)
    finally:
        if work is not None:
            work.close()


def _work_folder(request: QuantizeRequest) -> WorkFolder | None:
    """Lock the place of the folder, before text is read, or written by the model itself.

    Returns:
        None for a live module, and where a resumed run may be finished already.

    Raises:
        OutputError: the folder exists, or is being written, or holds an unfinished run that is not resumed.
    """
    out, overwrite = request.out, request.overwrite
    if out is None or (request.resume and out.exists() and not (overwrite and can_resume(out))):
        return None
    if request.resume and overwrite and out.exists():
        check_replaceable(out)
    elif not request.resume:
        check_output(out, overwrite)
    work = WorkFolder(out)
    if (overwrite or not os.path.lexists(out)) and (request.resume or not work.unfinished):
        return work
    work.close()  # another process has been here since
    if not request.resume:
        check_output(out, overwrite)
    return None


def _calibrate_folder(request: QuantizeRequest, folder: Path, kv: KVConfig) -> Outcome:
    """Add a KV calibration to a folder that bitmill wrote, or to a copy of it."""
    out = request.out or folder
    kv_workflow.calibrate_folder(
        folder,
        out,
        kv,
        request.calibration,
        request.device,
        request.trust_remote_code,
        request.progress,
        request.overwrite,
    )
    return _finished(open_checkpoint(out), {}, request.started)


def _run(prepared: PreparedJob, data: JobData, identity: dict[str, Any], work: WorkFolder | None) -> Outcome:
    """Quantize every block and write the folder, or put the packed layers into the live module."""
    request, streamed, model = prepared.request, prepared.streamed, prepared.request.model
    sink = None
    if work is not None:
        sink = FolderSink(
            work, prepared.resolved, identity, len(streamed.blocks), request.resume, request.overwrite
        )
    if prepared.resolved is not None and not (sink and 0 in sink.journal.blocks):
        reads_text = request.out is not None or request.measure > 0 or bool(prepared.resolved.needs)
        try_block_kinds(streamed, prepared.resolved.formats, reads_text)
    if work is None or sink is None:
        assert isinstance(model, nn.Module)
        in_place = ModuleSink(model)
        report = job_report(prepared, data, identity, _quantize_blocks(prepared, data, in_place))
        report["layers"] = in_place.layers
        in_place.finish()
        assert prepared.recipe is not None  # a live model keeps no calibration of keys and values
        attach_attention(model, prepared.recipe.to_dict())
        _mark_quantized(model, in_place, prepared.recipe)
        return Outcome(_summary(prepared.plan, None, request.started, report["measured"]), report, None, model)
    check_space(work.out, prepared.plan["size_bytes"])
    sink.prepare(streamed)
    check_space(work.out, prepared.plan["size_bytes"] + sink.auxiliary_bytes)
    _check_documents(prepared, data, identity)
    sink.begin()
    recorder = ReferenceRecorder() if streamed.task.generates else None
    report = job_report(prepared, data, identity, _quantize_blocks(prepared, data, sink, recorder))
    report["layers"] = sink.layers
    written = sink.complete(streamed)
    if prepared.kv:
        prepared.kv.write(written, request.progress)
    if reference := recorder and recorder.result():
        report |= _measure_running(prepared, written, reference)
    _measure_peak(prepared, written)
    sink.finish(report, folder_documents(report))
    return Outcome(_summary(prepared.plan, work.out, request.started, report["measured"]), report, work.out)


def _check_documents(prepared: PreparedJob, data: JobData, identity: dict[str, Any]) -> None:
    """Render report and documents once, so that a name that they cannot hold is found before the first block."""
    report = {**job_report(prepared, data, identity, {}), "layers": []}
    try:
        json.dumps(report)
        folder_documents(report)
    except (TypeError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UsageError(
            f"The report of {prepared.streamed.source.name} cannot be written ({one_line(error)}); "
            "choose other names for model, recipe and text."
        ) from None


def _mark_quantized(model: nn.Module, sink: ModuleSink, recipe: Recipe) -> None:
    """Tell transformers that a model is quantized, so that its save_pretrained writes what can be loaded again."""
    from bitmill.integrations.transformers_quantizer import mark_quantized

    mark_quantized(model, quantization_config(sink.formats, recipe.to_dict(), sink.places, sink.ends))


def _quantize_blocks(
    prepared: PreparedJob, data: JobData, sink: FolderSink | ModuleSink, recorder: ReferenceRecorder | None = None
) -> dict[str, Any]:
    """Send every block to the sink; returns the measured quality, empty where nothing was measured."""
    request, streamed = prepared.request, prepared.streamed
    if prepared.resolved is not None:
        job = Job(streamed, prepared.resolved, data, request.propagate, request.statistics, recorder)
        return run(job, sink, request.progress)
    assert isinstance(sink, FolderSink)
    sink.keep(streamed, request.progress)
    return {}


def _measure_running(prepared: PreparedJob, folder: Path, reference: ReferencePredictions) -> dict[str, Any]:
    """Compare a folder, as it runs, with the float model, whose predictions are written into it.

    Returns:
        The report's entry `running`; empty where the packed model does not fit into memory, as its blocks do.
    """
    request, trusted = prepared.request, prepared.streamed.source.trust_remote_code
    running = measure_folder(folder, reference, request.device, trusted, request.progress)
    if running is None:
        return {}
    write_tensors(folder / REFERENCE_FILE, reference.tensors())
    return {"running": running}


def _measure_peak(prepared: PreparedJob, folder: Path) -> None:
    """Measure the peak memory of a folder at the context of its budget, into the budget's entry of the report."""
    budget, request = prepared.plan.get("budget") or {}, prepared.request
    if "context" not in budget:
        return
    request.progress.start("running at the context of the budget", 0)
    try:
        peak = measured_peak(folder, budget["context"], request.trust_remote_code)
    except PeakNotMeasured as error:
        budget["notes"].append(str(error).rstrip("."))
        return
    budget["measured_peak_bytes"] = peak
    limit = parse_budget(budget["text"]).size_bytes or 0
    if peak > limit:
        budget["notes"].append(
            f"the measured peak of {peak / 1e6:,.0f} MB is above the budget; give a smaller one, or a shorter "
            "context"
        )


def _finished(checkpoint: Checkpoint, plan: dict[str, Any], started: float) -> Outcome:
    """Return the outcome of a finished folder: its plan or, without one, the record of its files."""
    report = checkpoint.report
    plan = plan or {**report_plan(checkpoint), "kv": report.get("kv")}
    return Outcome(_summary(plan, checkpoint.folder, started, report["measured"]), report, checkpoint.folder)


def _summary(plan: dict[str, Any], out: Path | None, started: float, measured: list[Any]) -> dict[str, Any]:
    return {
        **plan,
        "size_bytes": folder_bytes(out) if out else plan["size_bytes"],
        "measured": measured,
        "out": str(out) if out else None,
        "time_s": seconds_since(started),
        "peak_memory_bytes": peak_memory_bytes(),
    }
