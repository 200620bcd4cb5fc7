"""Run a grid: one cell after another, each noted when it is finished, so that a killed grid goes on.

    DIR/grid.json          the terms of the comparison and the cells asked for last
    DIR/cells/NAME.json    what became of a cell
    DIR/cells/NAME/        its quantized model, until it was measured (kept with `keep_models`)
    DIR/float.npy          what the float model predicts, until the grid is finished
    DIR/statistics/        of the float model, until the grid is finished; with propagate="float"
    DIR/results.json       everything, see report/results.py
    DIR/report.html        the page made from it

Running the same command again does what is missing and tries again what failed. Other methods and bits may be
added; other terms are refused.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bitmill.checkpoint.files import make_folder, write_json, write_text, writing
from bitmill.checkpoint.journal import first_difference
from bitmill.data import text
from bitmill.data.windows import check_context_length
from bitmill.errors import BitmillError, CheckpointError, OutputError, UsageError
from bitmill.progress import Progress
from bitmill.report.html import comparison_page
from bitmill.report.results import Results
from bitmill.sources.open import open_source
from bitmill.tasks.base import task_of
from bitmill.workflows.checks import check_device
from bitmill.workflows.comparison.cells import FLOAT, Cell, Grid
from bitmill.workflows.comparison.machine import describe_machine
from bitmill.workflows.comparison.process import CellFailed, run_cell
from bitmill.workflows.comparison.worker import FLOAT_FILE, GRID_FILE, STATISTICS

RESULTS_FILE = "results.json"
PAGE_FILE = "report.html"

RunCell = Callable[[Path, str, Path, Progress], dict[str, Any]]


def run_grid(
    grid: Grid,
    out: Path,
    *,
    keep_models: bool = False,
    progress: Progress | None = None,
    run: RunCell = run_cell,
) -> Results:
    """Quantize and measure every cell of `grid` into the folder `out`; returns what results.json holds.

    run: how one cell is run.

    Raises BitmillError for whatever concerns all cells: the model, the text, the folder, the float model's run.
    A cell that fails is a row of the results.
    """
    progress = progress or Progress()
    progress.start("reading text and model", 0)
    settings = describe_terms(grid)
    machine = describe_machine(grid.device)
    with writing(out):
        make_folder(out / "cells")
        lock = (out / "lock").open("w")
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(
                f"Another process is writing {out}; wait for it, or choose another folder."
            ) from None
        records = _Records(out, grid, settings, machine)
        records.begin(keep_models)
        return _run(grid, records, progress, run)
    finally:
        lock.close()


def describe_terms(grid: Grid) -> dict[str, Any]:
    """`settings` of the results. Raises BitmillError for a model or a text that cannot be used."""
    check_device(grid.device)
    source = open_source(grid.model, trust_remote_code=grid.trust_remote_code)
    task = task_of(source)
    if not task.generates:
        raise UsageError(
            f"{grid.model} is {task.description}, and a comparison needs perplexities and generated text; "
            "quantize it by each method, and measure with bitmill eval --reference."
        )
    terms, tokenizer = grid.calibration, source.tokenizer()
    check_context_length(source.config, terms.seqlen)
    windows = task.windows(terms.source, tokenizer)
    calib = windows.calibration(terms.samples, terms.seqlen, terms.seed)
    held_out = windows.held_out("eval", terms.seqlen, grid.windows)
    window = {"source": terms.source, "seqlen": terms.seqlen}
    of_calib = {"windows": terms.samples, "seed": terms.seed, "sha256": text.windows_hash(calib)}
    of_held_out = {"windows": len(held_out), "seed": None, "sha256": text.windows_hash(held_out)}
    return {
        "model": grid.model,
        "fingerprint": source.fingerprint(),
        "calibration": {**window, **of_calib},
        "evaluation": {**window, **of_held_out},
        "prompts": list(grid.prompts),
        "chat": bool(getattr(tokenizer, "chat_template", None)),
        "max_new_tokens": grid.max_new_tokens,
        "propagate": grid.propagate,
        "device": grid.device,
    }


def _run(grid: Grid, records: _Records, progress: Progress, run: RunCell) -> Results:
    """The float model where something still needs it, then every cell without a lasting record."""
    missing = [cell for cell in grid.cells if not records.settled(cell)]
    runnable = [cell for cell in missing if cell.recipe is not None]
    if records.read(FLOAT) is None or (runnable and not (records.out / FLOAT_FILE).exists()):
        try:
            row = run(records.out, FLOAT, records.log(FLOAT), progress)
        except CellFailed as failure:
            raise BitmillError(f"The float model cannot be measured: {failure}") from None
        records.write(FLOAT, row)
    for cell in missing:
        if cell.recipe is None:
            records.note(cell, {"status": "not_applicable", "reason": cell.reason})
            continue
        try:
            result = run(records.out, cell.name, records.log(cell.name), progress)
            records.note(cell, {"status": "done", **result})
        except CellFailed as failure:
            records.note(cell, {"status": "failed", "reason": str(failure)})
    # gigabytes, and quickly made again
    (records.out / FLOAT_FILE).unlink(missing_ok=True)
    shutil.rmtree(records.out / STATISTICS, ignore_errors=True)
    return records.publish()


class _Records:
    """The files of a comparison."""

    def __init__(self, out: Path, grid: Grid, settings: dict[str, Any], machine: dict[str, Any]) -> None:
        self.out, self.grid = out, grid
        self.commands: list[str] = []
        self.terms = json.loads(json.dumps({"settings": settings, "machine": machine}))

    def begin(self, keep_models: bool) -> None:
        """Note the grid.

        Raises CheckpointError when the folder holds results on other terms, OutputError when other things.
        """
        file = self.out / GRID_FILE
        if file.exists():
            before = _load(file)
            self.commands = [c for c in before.get("commands", []) if c != self.grid.command]
            if difference := first_difference(before.get("terms"), self.terms):
                key, old, new = difference
                raise CheckpointError(
                    f"{self.out} holds a comparison whose {key} was {old!r} and is now {new!r}; "
                    "restore that, or choose another folder with -o."
                )
            for cell in self.grid.cells:
                self._check_recipe(cell)
        elif strange := sorted({entry.name for entry in self.out.iterdir()} - {"cells", "lock"}):
            raise OutputError(f"{self.out} holds {strange[0]!r} and no comparison; choose another folder with -o.")
        self.commands.append(self.grid.command)
        document = {"terms": self.terms, "commands": self.commands, "grid": self.grid.to_dict()}
        write_json(file, {**document, "keep_models": keep_models})

    def _check_recipe(self, cell: Cell) -> None:
        known = self.read(cell.name)
        if known is None or known.get("status") == "failed":
            return
        if difference := first_difference(known.get("recipe"), json.loads(json.dumps(cell.recipe))):
            key, old, new = difference
            raise CheckpointError(
                f"{self.out} holds {cell.name!r} with another recipe ({key or 'recipe'} was {old!r} and is now "
                f"{new!r}); restore that, or choose another folder with -o."
            )

    def log(self, name: str) -> Path:
        """Where the process of a cell complains."""
        return self.out / "cells" / f"{name}.log"

    def read(self, name: str) -> dict[str, Any] | None:
        """What became of a cell, None when nothing did."""
        file = self._file(name)
        return _load(file) if file.exists() else None

    def settled(self, cell: Cell) -> bool:
        """Whether a cell need not be run again."""
        known = self.read(cell.name)
        return known is not None and known.get("status") in ("done", "not_applicable")

    def note(self, cell: Cell, result: dict[str, Any]) -> None:
        """Write what became of a cell, and everything that is known by now."""
        described = {"name": cell.name, "method": cell.method, "bits": cell.bits, "recipe": cell.recipe}
        self.write(cell.name, {**described, **result})
        self.publish()

    def write(self, name: str, record: dict[str, Any]) -> None:
        """Write one record, whole or not at all."""
        write_json(self._file(name), record)

    def publish(self) -> Results:
        """Write results.json and the page from the records."""
        names = [cell.name for cell in self.grid.cells]
        variants = [
            self.read(cell.name) or {"name": cell.name, "method": cell.method, "bits": cell.bits}
            for cell in self.grid.cells
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
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise CheckpointError(f"{file} cannot be read; delete it, and what it held is made again.") from None
