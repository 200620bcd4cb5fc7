"""Run a grid: one variant after another, each recorded when it is finished, so that a killed run can be continued.

    DIR/grid.json          the settings of the comparison and the latest requested variants
    DIR/cells/NAME.json    the record of a variant
    DIR/cells/NAME/        its quantized model, until it is measured (kept with `keep_models`)
    DIR/float.npy          the float model's predictions, until the grid is finished
    DIR/statistics/        of the float model, until the grid is finished; with propagate="float"
    DIR/results.json       all results, see report/results.py
    DIR/report.html        the page made from them

Running the command again completes missing variants and retries failed ones. Other methods and bits may be added;
other settings are refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bitmill.checkpoint.journal import first_difference
from bitmill.checkpoint.work_folder import LOCK, FolderLock
from bitmill.config.documents import load_json, read_document
from bitmill.data import text
from bitmill.data.windows import check_context_length, check_vocabulary, source_name
from bitmill.errors import BitmillError, CheckpointError, OutputError, UsageError
from bitmill.evaluation.prompt import is_chat
from bitmill.files import make_folder, output_errors, write_json, write_text
from bitmill.progress import Progress
from bitmill.report.html import comparison_page
from bitmill.report.results import MAX_RECORD_BYTES, FloatModel, Results, Variant
from bitmill.sources.open import open_source
from bitmill.tasks.base import task_of
from bitmill.workflows.checks import check_device
from bitmill.workflows.comparison.grid import FLOAT, Grid, VariantSpec
from bitmill.workflows.comparison.predictions import digest_file
from bitmill.workflows.comparison.process import VariantFailed, run_variant
from bitmill.workflows.comparison.worker import FLOAT_FILE, GRID_FILE, STATISTICS
from bitmill.workflows.machine import describe_machine
from bitmill.workflows.prepared_tasks import prepare_tasks
from bitmill.workflows.ray_tasks import tasks_on

RESULTS_FILE = "results.json"
PAGE_FILE = "report.html"

RunVariant = Callable[[Path, str, Path, Progress], dict[str, Any]]


def run_grid(
    grid: Grid,
    out: Path,
    *,
    keep_models: bool = False,
    ray: str | None = None,
    progress: Progress | None = None,
    run: RunVariant = run_variant,
) -> Results:
    """Quantize and measure every variant of `grid` into the folder `out`, and return the results.

    A variant that fails is a row of the results.

    Args:
        grid: variants and settings.
        out: folder of the comparison.
        keep_models: keep the quantized models.
        ray: address of a Ray cluster that runs the variants; None runs one after another on this machine.
        progress: receives the progress.
        run: runs one variant; in its own process by default.

    Raises:
        BitmillError: for errors that concern all variants: the model, the text, the folder, the float model.
    """
    progress = progress or Progress()
    progress.start("reading text and model", 0)
    settings = comparison_settings(grid)
    machine = describe_machine(grid.device)
    lock = FolderLock(out)
    try:
        with output_errors(out):
            make_folder(out / "cells")
        records = _Records(out, grid, settings, machine)
        records.begin(keep_models)
        return _run(grid, records, progress, run, ray)
    finally:
        lock.close()


def comparison_settings(grid: Grid) -> dict[str, Any]:
    """Return the `settings` of the results.

    Raises:
        BitmillError: the model or the text cannot be used.
    """
    check_device(grid.device)
    source = open_source(grid.model, trust_remote_code=grid.trust_remote_code)
    task = task_of(source)
    if not task.generates:
        raise UsageError(
            f"{grid.model} is {task.description}, and a comparison needs perplexities and generated text; "
            "quantize it by each method, and measure with bitmill eval --reference."
        )
    calibration, tokenizer = grid.calibration, source.tokenizer()
    check_context_length(source.config, calibration.seqlen)
    windows, measured = (task.windows(name, tokenizer) for name in (calibration.source, grid.measured_text))
    calib = windows.calibration(calibration.samples, calibration.seqlen, calibration.seed)
    held_out = measured.held_out("eval", calibration.seqlen, grid.windows)
    for tokens in (calib, held_out):
        check_vocabulary(source.config, tokens)
    window = {"seqlen": calibration.seqlen, "prefix": list(windows.prefix)}
    of_calib = {"source": calibration.name, "windows": calibration.samples, "seed": calibration.seed}
    of_held_out = {"source": source_name(grid.measured_text), "windows": len(held_out), "seed": None}
    cut = {"sha256": text.windows_hash(calib), **windows.describe("calib", calibration.samples)}
    domains = measured.domains("eval", calibration.seqlen, grid.windows)
    cut_held_out = {"sha256": text.windows_hash(held_out), **measured.describe("eval"), "domains": domains}
    return {
        "model": grid.model,
        "fingerprint": source.fingerprint(),
        "calibration": {**window, **of_calib, **cut},
        "evaluation": {**window, **of_held_out, **cut_held_out},
        "prompts": list(grid.prompts),
        "chat": is_chat(tokenizer),
        "max_new_tokens": grid.max_new_tokens,
        "propagate": grid.propagate,
        "device": grid.device,
        **_task_settings(grid),
    }


def _task_settings(grid: Grid) -> dict[str, Any]:
    """Return the setting `tasks`; nothing without tasks, as in the folders of earlier versions.

    Raises:
        BitmillError: a task cannot be measured.
    """
    if not grid.tasks:
        return {}
    prepared = prepare_tasks(grid.tasks, grid.limit, grid.run_code)
    names = [task.name for task in prepared.documents]
    return {"tasks": {"names": names, "limit": grid.limit, "unprotected": list(prepared.unprotected)}}


def _run(grid: Grid, records: _Records, progress: Progress, run: RunVariant, ray: str | None) -> Results:
    """Run the float model if a missing variant needs it, then every variant without a final record."""
    missing = [variant for variant in grid.variants if not records.is_final(variant)]
    runnable = [variant for variant in missing if variant.recipe is not None]
    if records.read(FLOAT) is None or (runnable and not (records.out / FLOAT_FILE).exists()):
        try:
            row = run(records.out, FLOAT, records.log(FLOAT), progress)
        except VariantFailed as failure:
            raise BitmillError(f"The float model cannot be measured: {failure}") from None
        records.write(FLOAT, row)
    for variant in missing:
        if variant.recipe is None:
            records.add(variant, {"status": "not_applicable", "reason": variant.reason})
    with tasks_on(ray if runnable else None, progress) as tasks:
        shown = progress if ray is None else Progress()  # another process cannot show it
        calls = [(run, records.out, variant.name, records.log(variant.name), shown) for variant in runnable]
        for number, outcome in tasks(_outcome, calls):
            records.add(runnable[number], outcome)
    # gigabytes that are quickly computed again
    for file in (records.out / FLOAT_FILE, digest_file(records.out / FLOAT_FILE)):
        file.unlink(missing_ok=True)
    shutil.rmtree(records.out / STATISTICS, ignore_errors=True)
    return records.publish()


def _outcome(run: RunVariant, out: Path, name: str, log: Path, progress: Progress) -> dict[str, Any]:
    """Run a variant, and return its result or the reason of its failure."""
    try:
        return {"status": "done", **run(out, name, log, progress)}
    except VariantFailed as failure:
        return {"status": "failed", "reason": str(failure)}


class _Records:
    """The files of a comparison."""

    def __init__(self, out: Path, grid: Grid, settings: dict[str, Any], machine: dict[str, Any]) -> None:
        self.out, self.grid = out, grid
        self.commands: list[str] = []
        self.terms = json.loads(json.dumps({"settings": settings, "machine": machine}))

    def begin(self, keep_models: bool) -> None:
        """Write grid.json.

        Raises:
            CheckpointError: the folder holds results with other settings.
            OutputError: the folder holds other files.
        """
        file = self.out / GRID_FILE
        if file.exists():
            before = _load(file)
            commands = before.get("commands", [])
            if not isinstance(commands, list) or not all(isinstance(command, str) for command in commands):
                raise _damaged(file)
            self.commands = [command for command in commands if command != self.grid.command]
            if difference := first_difference(before.get("terms"), self.terms):
                key, old, new = difference
                raise CheckpointError(
                    f"{self.out} holds a comparison whose {key} was {old!r} and is now {new!r}; "
                    "restore that, or choose another folder with -o."
                )
            for variant in self.grid.variants:
                self._check_recipe(variant)
        elif other := sorted({entry.name for entry in self.out.iterdir()} - {"cells", LOCK}):
            raise OutputError(f"{self.out} holds {other[0]!r} and no comparison; choose another folder with -o.")
        self.commands.append(self.grid.command)
        document = {"terms": self.terms, "commands": self.commands, "grid": self.grid.to_dict()}
        write_json(file, {**document, "keep_models": keep_models})

    def _check_recipe(self, variant: VariantSpec) -> None:
        record = self.read(variant.name)
        if record is None or record.get("status") == "failed":
            return
        if difference := first_difference(record.get("recipe"), json.loads(json.dumps(variant.recipe))):
            key, old, new = difference
            raise CheckpointError(
                f"{self.out} holds {variant.name!r} with another recipe ({key or 'recipe'} was {old!r} and is now "
                f"{new!r}); restore that, or choose another folder with -o."
            )

    def log(self, name: str) -> Path:
        """Return the file for stderr of a variant's process."""
        return self.out / "cells" / f"{name}.log"

    def read(self, name: str) -> dict[str, Any] | None:
        """Return the record of a variant; None if there is none."""
        file = self._file(name)
        if not file.exists():
            return None
        record = _load(file)
        try:
            (FloatModel if name == FLOAT else Variant).model_validate(record)
        except ValidationError:
            raise _damaged(file) from None
        return record

    def is_final(self, variant: VariantSpec) -> bool:
        """Return True if a variant need not be run again."""
        record = self.read(variant.name)
        return record is not None and record.get("status") in ("done", "not_applicable")

    def add(self, variant: VariantSpec, result: dict[str, Any]) -> None:
        """Write the record of a variant, and the results so far."""
        spec = {"name": variant.name, "method": variant.method, "bits": variant.bits, "recipe": variant.recipe}
        self.write(variant.name, {**spec, **result})
        self.publish()

    def write(self, name: str, record: dict[str, Any]) -> None:
        """Write one record atomically."""
        write_json(self._file(name), record)

    def publish(self) -> Results:
        """Write results.json and the page from the records, and return the results."""
        names = [spec.name for spec in self.grid.variants]
        variants = [
            self.read(spec.name) or {"name": spec.name, "method": spec.method, "bits": spec.bits}
            for spec in self.grid.variants
        ]
        others = sorted({file.stem for file in (self.out / "cells").glob("*.json")} - {*names, FLOAT})
        earlier = [record for name in others if (record := self.read(name))]
        variants += [record for record in earlier if record.get("status") == "done"]
        results = Results.model_validate(
            {"commands": self.commands, **self.terms, "float": self.read(FLOAT), "variants": variants}
        )
        write_text(self.out / RESULTS_FILE, results.model_dump_json(indent=1) + "\n")
        write_text(self.out / PAGE_FILE, comparison_page(results))
        return results

    def _file(self, name: str) -> Path:
        return self.out / "cells" / f"{name}.json"


def _load(file: Path) -> dict[str, Any]:
    try:
        return dict(load_json(read_document(file, "record", CheckpointError, MAX_RECORD_BYTES)))
    except (CheckpointError, ValueError, TypeError):
        raise _damaged(file) from None


def _damaged(file: Path) -> CheckpointError:
    return CheckpointError(f"{file} cannot be read; delete it, and its contents are computed again.")
