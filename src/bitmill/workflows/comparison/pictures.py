"""Compare methods on a vision model: quantize, measure against the float model, and show feature maps.

    DIR/results.json       all results, see report/pictures.py
    DIR/report.html        the page made from them
    DIR/cells/NAME/        a quantized model, until it is measured (kept with `keep_models`)

Running the command again completes missing variants and retries failed ones; other settings are refused.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from bitmill.checkpoint.journal import first_difference
from bitmill.checkpoint.work_folder import LOCK, FolderLock
from bitmill.config.documents import load_json, read_document
from bitmill.data.text import windows_hash
from bitmill.data.windows import source_name
from bitmill.errors import BitmillError, CheckpointError, OutputError, UsageError, one_line
from bitmill.evaluation.feature_maps import FeatureColours, patch_cosine, patch_features, shown_picture
from bitmill.evaluation.metrics import score_windows
from bitmill.files import make_folder, output_errors, write_json, write_text
from bitmill.models.block_call import output_fn
from bitmill.progress import Progress
from bitmill.recipes.recipe import Recipe
from bitmill.report.html import picture_page
from bitmill.report.pictures import PictureExample, PictureResults, PictureVariant
from bitmill.report.results import MAX_RECORD_BYTES
from bitmill.sources.open import open_source
from bitmill.tasks.base import Task, task_of
from bitmill.version import __version__
from bitmill.workflows.checks import check_device
from bitmill.workflows.comparison.grid import Grid, VariantSpec
from bitmill.workflows.load import live_model
from bitmill.workflows.quantize.run import quantize

RESULTS_FILE, PAGE_FILE, CELLS = "results.json", "report.html", "cells"
EXAMPLES = 3  # pictures whose feature maps are shown


def compare_pictures(
    grid: Grid, out: Path, *, keep_models: bool = False, progress: Progress | None = None
) -> PictureResults:
    """Quantize and measure every variant into the folder `out`, and write a page with feature maps.

    A variant that fails is a row of the results.

    Raises:
        BitmillError: for errors that concern all variants: the model, the pictures, the folder.
    """
    if grid.tasks:
        raise UsageError(f"{grid.model} reads pictures, and tasks are for language models; leave --tasks out.")
    check_device(grid.device)
    lock = FolderLock(out)
    try:
        with output_errors(out):
            make_folder(out / CELLS)
        return _Comparison(grid, out, keep_models, progress or Progress()).run()
    finally:
        lock.close()


@dataclass
class _Float:
    """The float model's outputs on the pictures that are measured, and what is shown of some.

    Attributes:
        outputs: what the model returns for each batch.
        examples: pictures to show.
        features: of their patches; None where these are no square.
    """

    outputs: list[Tensor]
    examples: Tensor
    features: Tensor | None
    colours: list[FeatureColours] = field(default_factory=list)


class _Comparison:
    """One run of a comparison."""

    def __init__(self, grid: Grid, out: Path, keep_models: bool, progress: Progress) -> None:
        self.grid, self.out, self.keep_models, self.progress = grid, out, keep_models, progress
        source = open_source(grid.model, trust_remote_code=grid.trust_remote_code)
        self.task: Task = task_of(source)
        windows: Any = self.task.windows(grid.measured_text, self.task.reader(source))
        self.pictures: Tensor = windows.held_out("eval", 0, grid.windows)
        self.labels: dict[str, int] = windows.domains("eval", 0, grid.windows)
        calibration = grid.calibration
        self.terms = {
            "model": grid.model,
            "fingerprint": source.fingerprint(),
            "calibration": {
                "source": calibration.name,
                "pictures": calibration.samples,
                "seed": calibration.seed,
            },
            "evaluation": {
                "source": source_name(grid.measured_text),
                "pictures": len(self.pictures),
                "sha256": windows_hash(self.pictures),
            },
            "propagate": grid.propagate,
            "device": grid.device,
        }
        self.results = self._begin()

    def _begin(self) -> PictureResults:
        """Return the results that the folder holds, of its variants with equal recipes; empty ones otherwise."""
        terms = json.loads(json.dumps(self.terms))
        kept: dict[str, PictureVariant] = {}
        examples: list[PictureExample] = []
        file = self.out / RESULTS_FILE
        if file.exists():
            try:
                document = load_json(read_document(file, "record", CheckpointError, limit_bytes=MAX_RECORD_BYTES))
                before = PictureResults.model_validate(document)
            except (ValueError, ValidationError) as error:
                raise CheckpointError(
                    f"{file} holds no comparison of a vision model ({one_line(error)}); choose another folder."
                ) from None
            if difference := first_difference(before.terms, terms):
                key, old, new = difference
                raise CheckpointError(
                    f"{self.out} holds a comparison whose {key} was {old!r} and is now {new!r}; restore that, or "
                    "choose another folder with -o."
                )
            kept, examples = {variant.name: variant for variant in before.variants}, before.examples
        elif other := sorted({entry.name for entry in self.out.iterdir()} - {CELLS, LOCK}):
            raise OutputError(f"{self.out} holds {other[0]!r} and no comparison; choose another folder with -o.")
        variants = [_row(spec, kept.pop(spec.name, None)) for spec in self.grid.variants]
        return PictureResults(
            bitmill=__version__,
            command=self.grid.command,
            terms=terms,
            variants=[*kept.values(), *variants],
            examples=examples,
        )

    def run(self) -> PictureResults:
        """Measure what is missing."""
        missing = [row for row in self.results.variants if row.status in ("pending", "failed") and row.recipe]
        if missing:
            reference = self._run_float()
            for row in missing:
                try:
                    self._run_variant(row, reference)
                except BitmillError as error:
                    row.status, row.reason = "failed", str(error)
                self._publish()
        self._publish()
        return self.results

    def _run_float(self) -> _Float:
        """Run the float model on the pictures."""
        model = live_model(self.grid.model, self.grid.device, self.grid.trust_remote_code).eval()
        run = output_fn(model)
        self.progress.start("float model", len(self.pictures))
        outputs = []
        with torch.no_grad():
            for batch in self.pictures.split(self.task.batch_size):
                outputs.append(run(batch).cpu())
                self.progress.advance(len(batch))
        chosen = torch.linspace(0, len(self.pictures) - 1, min(EXAMPLES, len(self.pictures))).round().long()
        examples = self.pictures[chosen]
        found = _Float(outputs, examples, patch_features(model, examples.to(self.grid.device)))
        if found.features is not None:
            found.colours = [FeatureColours(features) for features in found.features]
            if len(self.results.examples) != len(examples):
                self.results.examples = [
                    PictureExample(picture=shown_picture(pixels), float_map=colours.picture(features))
                    for pixels, features, colours in zip(examples, found.features, found.colours)
                ]
        return found

    def _run_variant(self, row: PictureVariant, reference: _Float) -> None:
        """Quantize one variant and measure it."""
        folder, grid = self.out / CELLS / row.name, self.grid
        outcome = quantize(
            grid.model,
            Recipe.from_dict(row.recipe),
            out=folder,
            calib=grid.calibration,
            measure=0,
            propagate=grid.propagate,
            device=grid.device,
            trust_remote_code=grid.trust_remote_code,
            progress=self.progress,
            overwrite=folder.exists(),
        )
        model: nn.Module = live_model(folder, grid.device, grid.trust_remote_code).eval()
        answers = iter(reference.outputs)
        row.figures = score_windows(
            output_fn(model),
            self.pictures,
            lambda batch: next(answers),
            self.progress,
            self.task.batch_size,
            self.task.metric(),
            self.labels,
        )
        features = patch_features(model, reference.examples.to(grid.device))
        if features is not None and reference.features is not None:
            for example, own, other, colours in zip(
                self.results.examples, features, reference.features, reference.colours
            ):
                example.maps[row.name] = colours.picture(own)
                example.cosines[row.name] = patch_cosine(own, other)
        summary = outcome.summary
        row.bits_per_weight, row.size_bytes = summary["bits_per_weight"], summary["size_bytes"]
        row.quantize_time_s = summary["time_s"]
        row.status, row.reason = "done", None
        if not self.keep_models:
            shutil.rmtree(folder)

    def _publish(self) -> None:
        with output_errors(self.out):
            write_json(self.out / RESULTS_FILE, self.results.model_dump())
            write_text(self.out / PAGE_FILE, picture_page(self.results))


def _row(spec: VariantSpec, before: PictureVariant | None) -> PictureVariant:
    """Return the row of a requested variant: that of an earlier run with an equal recipe, or a new one."""
    recipe = json.loads(json.dumps(spec.recipe))
    if before is not None and before.recipe == recipe:
        return before
    status: Literal["pending", "not_applicable"] = "pending" if recipe else "not_applicable"
    return PictureVariant(
        name=spec.name, method=spec.method, bits=spec.bits, status=status, reason=spec.reason, recipe=recipe
    )
