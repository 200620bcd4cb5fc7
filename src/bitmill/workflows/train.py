"""Train the continuous parameters of a quantized folder from end to end, into a new folder."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bitmill.checkpoint.overwrite import new_folder
from bitmill.checkpoint.reader import Checkpoint, open_checkpoint
from bitmill.checkpoint.trained import add_running, check_report, copy_trained
from bitmill.checkpoint.training_journal import TrainingJournal
from bitmill.checkpoint.work_folder import SUFFIX_BYTES, WorkFolder, remove
from bitmill.config.arguments import checked_arguments
from bitmill.config.paths import user_path
from bitmill.data.held_apart import hold_apart
from bitmill.data.text import windows_hash
from bitmill.data.windows import (
    SELF,
    CalibrationData,
    as_calibration,
    check_context_length,
    check_vocabulary,
    checked_windows,
)
from bitmill.errors import BitmillError, CalibrationError, NumericsError, UsageError
from bitmill.evaluation.logits import DeferredLogits
from bitmill.evaluation.reference import read_reference
from bitmill.models.config_only import open_config_only
from bitmill.models.meta import trim_malloc
from bitmill.progress import Progress, peak_memory_bytes
from bitmill.progress.terminal import displayed
from bitmill.recipes.method import Method
from bitmill.recipes.recipe import Recipe
from bitmill.report.text import format_rows, training_rows
from bitmill.tasks.base import task_for
from bitmill.training.distil import Training, WindowSet
from bitmill.training.loss import LossName
from bitmill.training.options import TrainingOptions
from bitmill.training.snapshot import TrainingResult
from bitmill.training.student import Learn, Student
from bitmill.workflows.checks import check_device, check_space, machine_identity
from bitmill.workflows.load import load, load_tokenizer
from bitmill.workflows.machine import seconds_since
from bitmill.workflows.running import measure_folder
from bitmill.workflows.teacher import Teacher
from bitmill.workflows.training_start import START, quantized_start


@dataclass
class TrainingOutcome:
    """The result of `train`; `print` shows a summary.

    teacher: the float model as given.
    """

    summary: dict[str, Any]
    report: dict[str, Any] = field(repr=False)
    out: Path
    teacher: str = "MODEL"

    def rows(self) -> list[tuple[str, str]]:
        """Return the summary as (name, value) pairs to print."""
        return training_rows(self.summary, self.teacher)

    def __str__(self) -> str:
        rows = self.rows()
        return format_rows(rows)


@checked_arguments("teacher", "calib", "method", "progress")
def train(
    folder: str | Path,
    *,
    out: str | Path,
    method: str | Path | Recipe | Method | None = None,
    options: dict[str, Any] | None = None,
    teacher: str | Path | nn.Module | None = None,
    calib: CalibrationData | Tensor | str | Path | list[str] | None = None,
    loss: LossName = "kl",
    learn: Learn = "all",
    epochs: int = 1,
    rate: float = TrainingOptions.rate,
    tokens: int = 512,
    held_apart: int = 8,
    max_minutes: float | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | bool | None = None,
) -> TrainingOutcome:
    """Train scales, codebooks and norms of a quantized folder to the float model's predictions; codes stay.

    The state with the lowest loss on windows that were kept out of training is written, the start included.

    Args:
        folder: a folder that bitmill quantize wrote, in any format; with `method` a float model.
        out: the folder to write.
        method: quantize a float model by this method or recipe first, on the text that it is trained on; that
            folder is kept as OUT-start.
        options: of the method, such as {"bits": 2, "group_size": 64}.
        teacher: the float model; by default the one that the folder was made from.
        calib: text to train on, as for `quantize`, of which `held_apart` windows are kept out of training, or
            token windows (samples, length).
        loss: "kl" is the divergence from the teacher's next-token distributions; "next-token" the cross entropy
            of the text itself, without a teacher.
        learn: "scales" are the numbers that formats store, "norms" the norms and biases of the blocks.
        epochs: passes over the windows.
        rate: of Adam, in units of the root mean square of each parameter's row.
        tokens: in a step, in whole windows.
        held_apart: windows that choose the state which is written.
        max_minutes: training ends after this time, as if its epochs were over.
        resume: continue an interrupted training.
        overwrite: replace a folder that bitmill wrote, once the new one is complete.
        device: device to train on.
        trust_remote_code: allow Python code in the folder to run.
        progress: where progress is reported; True displays it, which terminals and notebooks do; False is silent.

    Raises:
        BitmillError: anything wrong with folder, teacher, text or disk, in one sentence.
        NumericsError: the loss is NaN or infinite before anything is better than the start.
    """
    started = time.perf_counter()
    training = TrainingOptions(loss, learn, epochs, rate, tokens, held_apart, max_minutes)
    check_device(device)
    calibration, place = as_calibration(calib), user_path(out, SUFFIX_BYTES + len(START))
    if method is None and options:
        raise UsageError(
            f"{next(iter(options))} is an option of a method; name the method with --method (method)."
        )
    with displayed(progress) as shown:
        if method is not None:
            teacher = folder if teacher is None else teacher
            folder = quantized_start(
                folder, method, options or {}, place, calibration=calibration, resume=resume, overwrite=overwrite,
                device=device, trust_remote_code=trust_remote_code, progress=shown,
            )  # fmt: skip
        run = _Run(open_checkpoint(folder), teacher, training, device, trust_remote_code, shown)
        if place.resolve().is_relative_to(run.folder.resolve()):
            raise UsageError(f"{place} lies in {run.folder}, of which it is made; choose another folder with -o.")
        with new_folder(place, overwrite, resume) as work:
            described = run.write(work, calibration)
    report = open_checkpoint(place).report
    summary = {
        "folder": str(run.folder),
        "out": str(place),
        **described,
        "bits_per_weight": report.get("bits_per_weight"),
        "time_s": seconds_since(started),
        "peak_memory_bytes": peak_memory_bytes(),
    }
    named = str(teacher) if isinstance(teacher, str | Path) else described["teacher"]
    return TrainingOutcome(summary, report, place, named or "MODEL")


class _Run:
    """One training of a folder."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        teacher: str | Path | nn.Module | None,
        options: TrainingOptions,
        device: str,
        trust_remote_code: bool,
        progress: Progress,
    ) -> None:
        self.checkpoint, self.folder, self.options = checkpoint, checkpoint.folder, options
        self.device, self.trusted, self.progress = device, trust_remote_code, progress
        if not checkpoint.formats:
            raise UsageError(
                f"{self.folder} holds a float model, which has nothing to train; name a method that "
                "quantizes it first with --method (method), or give a quantized folder."
            )
        check_report(self.folder, checkpoint.report)
        task = task_for(checkpoint.config)
        if not task.generates:
            raise UsageError(f"{self.folder} is {task.description}; only language models can be trained.")
        self.task, self.config = task, open_config_only(self.folder, trust_remote_code=trust_remote_code).config
        self._writer = teacher
        self.teacher = None if options.loss == "next-token" else Teacher(teacher, checkpoint, self.config)

    def write(self, work: WorkFolder, calibration: CalibrationData | Tensor | None) -> dict[str, Any]:
        """Train and write the folder; returns the summary."""
        check_space(work.out, sum(path.stat().st_size for path in set(self.checkpoint.files.values())))
        self.progress.start("reading text and model", 0)
        windows, about = self._windows(calibration)
        kept, apart = hold_apart(windows, self.options.held_apart)
        self._check_batch(kept)
        expected = self._expected([*kept, *apart])
        data = WindowSet(kept, expected[: len(kept)])
        held = WindowSet(apart, expected[len(kept) :])
        student = self._student(apart, expected)
        seed = 0 if isinstance(calibration, Tensor) or calibration is None else calibration.seed
        identity = self._identity(about)
        journal = TrainingJournal(work.path, identity)
        try:
            result = Training(student, data, held, self.options, seed, self.progress, journal).run()
        except NumericsError:  # which it would meet again
            work.clear()
            raise
        described = self._describe(student, result, {**about, "trained_on": len(kept)})
        del student, data, held, expected
        trim_malloc()
        remove(work.model)  # what a killed run was writing
        copy_trained(self.checkpoint, work.model, result.state, described, identity)
        self._measure(work.model)
        return described

    def _identity(self, about: dict[str, Any]) -> dict[str, Any]:
        """Return everything that decides the result, as plain data."""
        report = self.checkpoint.report
        return {
            "folder": report["source"],
            "files": {name: record.sha256 for name, record in self.checkpoint.record.items()},
            "teacher": self.teacher.name if self.teacher else None,
            "options": asdict(self.options),
            "windows": about,
            **machine_identity(self.device),
        }

    def _windows(self, calibration: CalibrationData | Tensor | None) -> tuple[Tensor, dict[str, Any]]:
        """Return token windows (samples, length), and the report's entry on them."""
        config = self.config
        if isinstance(calibration, Tensor):
            windows = checked_windows(calibration, config)
            return windows, {"source": "tokens", "sha256": windows_hash(windows)}
        text = calibration or CalibrationData()
        check_context_length(config, text.seqlen)
        entry = {**vars(text), "source": text.name}
        if text.source == SELF:
            windows = self._self_generated(text)
        else:
            reading = self.task.windows(text.source, load_tokenizer(self.folder, trust_remote_code=self.trusted))
            windows = reading.calibration(text.samples, text.seqlen, text.seed)
            entry |= reading.describe("calib", text.samples)
        check_vocabulary(config, windows)
        return windows, {**entry, "sha256": windows_hash(windows)}

    def _self_generated(self, text: CalibrationData) -> Tensor:
        """Return windows that the float model writes, also where the loss needs no teacher."""
        teacher = self.teacher or Teacher(self._writer, self.checkpoint, self.config)
        tokenizer = None
        with suppress(BitmillError):  # a folder of a live model may have none
            tokenizer = load_tokenizer(self.folder, trust_remote_code=self.trusted)
        return teacher.windows(text, self.device, self.trusted, tokenizer, self.progress)

    def _check_batch(self, windows: Tensor) -> None:
        """Raise CalibrationError for fewer windows than a step reads."""
        count, length = windows.shape
        step = max(1, self.options.tokens // length)
        if count < step:
            raise CalibrationError(
                f"A step reads {self.options.tokens} tokens, {step} windows of {length}, and the text leaves "
                f"{count} to train on; use more --samples (samples) or a smaller --tokens (tokens)."
            )

    def _expected(self, windows: list[Tensor]) -> list[DeferredLogits]:
        """Return the teacher's outputs for windows; none without a teacher."""
        if self.teacher is None:
            return []
        return self.teacher.outputs(windows, self.device, self.trusted, self.progress)

    def _student(self, tokens: Tensor, expected: list[DeferredLogits]) -> Student:
        self.progress.start("reading the folder", 0)
        model = load(self.folder, device=self.device, trust_remote_code=self.trusted)
        dtypes = {name: entry.dtype for name, entry in self.checkpoint.entries.items()}
        student = Student(model, dtypes, self.options.learn, tokens)
        trim_malloc()
        if not student.learned:
            raise UsageError(
                f"{self.folder} stores nothing that training with learn={self.options.learn!r} could change; use "
                "--learn all."
            )
        for format, layers in student.fixed.items():
            self.progress.note(
                f"{layers} layers in the format {format} store no scales in float and stay as they are"
            )
        if self.teacher is not None:
            self.teacher.check_vocabulary(expected[0], student.vocabulary)
        return student

    def _describe(self, student: Student, result: TrainingResult, about: dict[str, Any]) -> dict[str, Any]:
        """Return the report's entry on the training, which holds nothing that depends on the machine's speed."""
        options = asdict(self.options)
        limit = options.pop("max_minutes")
        return {
            **options,
            **({"max_minutes": limit} if limit is not None else {}),
            "teacher": self.teacher.name if self.teacher else None,
            "windows": about,
            "parameters": sum(leaf.numel() for leaf in student.leaves()),
            "steps": result.steps,
            "best_step": result.best_step,
            "before": result.start,
            "after": result.best,
            "curve": result.curve,
            **({"stopped": result.stopped} if result.stopped else {}),
        }

    def _measure(self, new: Path) -> None:
        """Measure how the new folder runs, where it keeps the float model's predictions."""
        reference = read_reference(new)
        if reference is not None:
            add_running(new, measure_folder(new, reference, self.device, self.trusted, self.progress))
