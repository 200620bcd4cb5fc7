"""The worker process of one variant: `python -m bitmill.workflows.comparison.worker DIR NAME`.

Each variant has its own process, so that its peak memory is its own, and running out of memory ends only this
variant. DIR holds `grid.json`; NAME is a variant, or `float` for the float model. The process writes lines of
JSON to stdout: progress, and last the result or the reason of the failure. It ends when its stdin closes, which
is when its parent has ended.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch

from bitmill.checkpoint.record import record_measurement, record_tasks
from bitmill.checkpoint.work_folder import partial_folder, remove_leftovers
from bitmill.config.documents import load_json
from bitmill.data.text import windows_hash
from bitmill.data.windows import TextWindows, describe_held_out, source_name
from bitmill.errors import BitmillError, CheckpointError
from bitmill.evaluation.answers import answer_prompts
from bitmill.evaluation.metrics import score_windows
from bitmill.files import folder_bytes, write_json
from bitmill.models.split import deferred_output_fn
from bitmill.progress import Progress, peak_memory_bytes
from bitmill.recipes.recipe import Recipe
from bitmill.report.describe import split_layers
from bitmill.tasks.causal_lm import CausalLM
from bitmill.workflows.comparison.grid import FLOAT, Grid, VariantSpec
from bitmill.workflows.comparison.predictions import PredictionRecorder, RecordedPredictions
from bitmill.workflows.comparison.process import exit_with_parent
from bitmill.workflows.load import load, load_tokenizer
from bitmill.workflows.prepared_tasks import prepare_tasks
from bitmill.workflows.quantize.run import Outcome, quantize
from bitmill.workflows.sizes import stored_bits

GRID_FILE = "grid.json"
FLOAT_FILE = "float.npy"
STATISTICS = "statistics"
_LAYER_KEYS = ("name", "format", "shape", "bits_per_weight", "size_bytes", "weight_error", "output_error")

Send = Callable[[dict[str, Any]], None]


def main(arguments: list[str], stdin: TextIO | None = None, stdout: TextIO | None = None) -> int:
    """Run one variant and return the exit status, 0 when it has a result.

    Args:
        arguments: DIR and NAME.
        stdin: when it closes the process ends.
        stdout: receives the messages; that of the process when left out.
    """
    folder, name = Path(arguments[0]), arguments[1]
    out = stdout or sys.stdout
    if stdin is not None:
        threading.Thread(target=exit_with_parent, args=(stdin,), daemon=True).start()

    def send(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=out, flush=True)

    with contextlib.redirect_stdout(sys.stderr):  # for libraries that print
        try:
            document = load_json((folder / GRID_FILE).read_text(encoding="utf-8"))
            torch.set_num_threads(document["terms"]["machine"]["threads"])
            job = _VariantJob(folder, document, _JsonProgress(send))
            send({"result": job.measure_float() if name == FLOAT else job.run(name)})
        except BitmillError as error:
            send({"failed": str(error)})
            return error.exit_code
        except Exception as error:
            traceback.print_exc()
            text = " ".join(str(error).split())[:300].rstrip(".")
            send({"failed": f"Unexpected {type(error).__name__}" + (f": {text}." if text else ".")})
            return 70
    return 0


class _VariantJob:
    """The steps of a variant: quantize, measure, answer the prompts."""

    def __init__(self, folder: Path, document: dict[str, Any], progress: Progress) -> None:
        self.folder, self.grid, self.progress = folder, Grid.from_dict(document["grid"]), progress
        self.keep_models = bool(document.get("keep_models"))
        self.windows_sha256 = document["terms"]["settings"]["evaluation"]["sha256"]
        self.load_options: dict[str, Any] = {
            "device": self.grid.device,
            "trust_remote_code": self.grid.trust_remote_code,
        }

    def measure_float(self) -> dict[str, Any]:
        """Measure the float model, and record its predictions for the variants."""
        bits, size = stored_bits(self.grid.model, self.grid.trust_remote_code)
        windows, reading, tokenizer = self._held_out(self.grid.model)
        model = load(self.grid.model, **self.load_options)
        recorder = PredictionRecorder(self.folder / FLOAT_FILE, deferred_output_fn(model), windows)
        measured = score_windows(recorder, windows, None, self.progress, batch=1, domains=self._domains(reading))
        recorder.finish()
        return {"bits_per_weight": bits, "size_bytes": size, **measured, **self._answers(model, tokenizer)}

    def run(self, name: str) -> dict[str, Any]:
        """Quantize a variant into `cells/NAME`, measure it against the float model, and answer the prompts."""
        (spec,) = (variant for variant in self.grid.variants if variant.name == name)
        out = self.folder / "cells" / name
        outcome, cost = self._quantize(spec, out)
        size = folder_bytes(out)
        measured = self._measure(out)
        if not self.keep_models:
            shutil.rmtree(out)
        _state_file(out).unlink(missing_ok=True)
        block_layers, _ = split_layers(outcome.report)
        return {
            "bits_per_weight": outcome.summary["bits_per_weight"],
            "size_bytes": size,
            **measured,
            **cost,
            "layers": [{key: layer[key] for key in _LAYER_KEYS} for layer in block_layers],
        }

    def _quantize(self, spec: VariantSpec, out: Path) -> tuple[Outcome, dict[str, Any]]:
        """Quantize a variant, or resume it; return the outcome and the cost."""
        assert spec.recipe is not None
        state = _state_file(out)
        if not _has_work(out):
            state.unlink(missing_ok=True)  # counts work that was deleted
        uncounted = not state.exists()
        cost = _CostRecorder(state, self.progress, spec.recipe)
        if uncounted or cost.is_other_recipe:
            shutil.rmtree(out, ignore_errors=True)
            remove_leftovers(out)
        try:
            outcome = quantize(
                self.grid.model,
                Recipe.from_dict(spec.recipe),
                out=out,
                calib=self.grid.calibration,
                measure=0,
                resume=True,
                propagate=self.grid.propagate,
                statistics=self.folder / STATISTICS if self.grid.propagate == "float" else None,
                progress=cost,
                **self.load_options,
            )
        finally:
            if not _has_work(out):
                state.unlink(missing_ok=True)  # failed before there was any work
        return outcome, cost.save(finished=True)

    def _measure(self, out: Path) -> dict[str, Any]:
        """Measure a quantized folder against the recorded predictions; return the metrics, answers and tasks."""
        windows, reading, tokenizer = self._held_out(out)
        model = load(out, dense=True, **self.load_options)
        predictions = RecordedPredictions(self.folder / FLOAT_FILE, windows)
        measured = score_windows(
            deferred_output_fn(model), windows, predictions, self.progress, 1, domains=self._domains(reading)
        )
        reference_perplexity = measured.pop("reference_perplexity")
        answers = self._answers(model, tokenizer)
        if self.keep_models:
            seqlen, text = self.grid.calibration.seqlen, self.grid.measured_text
            cut = describe_held_out(reading, text, "eval", seqlen, self.grid.windows)
            reference = {"reference": self.grid.model, "reference_perplexity": reference_perplexity}
            record_measurement(out, {**measured, **cut, "windows": len(windows), **reference})
            if answers["tasks"]:
                record_tasks(out, answers)
        return {**measured, **answers}

    def _domains(self, reading: TextWindows) -> dict[str, int]:
        """Return the number of held-out windows of each domain."""
        return reading.domains("eval", self.grid.calibration.seqlen, self.grid.windows)

    def _held_out(self, model: str | Path) -> tuple[Any, TextWindows, Any]:
        """Return the held-out windows, how their text is read, and the tokenizer that made them."""
        self.progress.start("reading text and model", 0)
        tokenizer = load_tokenizer(model, trust_remote_code=self.grid.trust_remote_code)
        text = self.grid.measured_text
        reading = CausalLM().windows(text, tokenizer)
        windows = reading.held_out("eval", self.grid.calibration.seqlen, self.grid.windows)
        if windows_hash(windows) != self.windows_sha256:
            raise CheckpointError(
                f"The tokenizer of {model} or the text {source_name(text)!r} has changed since the comparison "
                "began, so results would not be comparable; choose another folder with -o."
            )
        return windows, reading, tokenizer

    def _answers(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        """Return the answers to the prompts in `samples`, and the figures of tasks in `tasks`."""
        grid, tasks = self.grid, {}
        samples = answer_prompts(model, tokenizer, grid.prompts, grid.max_new_tokens, self.progress)
        if grid.tasks:
            prepared = prepare_tasks(grid.tasks, grid.limit, grid.run_code)
            tasks = prepared.measure(model, tokenizer, self.progress)
            self.progress.finish()
        return {"samples": samples, "tasks": tasks}


def _state_file(out: Path) -> Path:
    return out.with_name(out.name + ".state")


def _has_work(out: Path) -> bool:
    return out.exists() or partial_folder(out).exists()


class _CostRecorder(Progress):
    """Records time and memory of quantization, summed over all processes that took part in it.

    Saved after every block, as the blocks are: a run that was killed and resumed is charged once for each block.

    Attributes:
        is_other_recipe: the saved cost is that of another recipe, and is not charged.
    """

    def __init__(self, path: Path, inner: Progress, recipe: dict[str, Any]) -> None:
        self.path, self.inner, self.recipe = path, inner, json.loads(json.dumps(recipe))
        before = load_json(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.is_other_recipe = before.get("recipe", self.recipe) != self.recipe
        if self.is_other_recipe:
            before = {}
        self.time_s = float(before.get("quantize_time_s", 0.0))
        self.peak = int(before.get("peak_memory_bytes", 0))
        self.finished = bool(before.get("finished"))  # later work is not quantization
        self.started = time.perf_counter()
        self.save()  # so that a run killed in its first block has recorded its recipe

    def start(self, task: str, total: int) -> None:
        """Forward the task."""
        self.inner.start(task, total)

    def advance(self, steps: int = 1) -> None:
        """Save the cost and forward the steps."""
        self.save()
        self.inner.advance(steps)

    def finish(self) -> None:
        """Forward the end of the task."""
        self.inner.finish()

    def save(self, finished: bool = False) -> dict[str, Any]:
        """Save and return the time and the peak memory so far; `finished` ends the quantization."""
        elapsed = 0.0 if self.finished else time.perf_counter() - self.started
        cost = {
            "quantize_time_s": round(self.time_s + elapsed, 3),
            "peak_memory_bytes": self.peak if self.finished else max(self.peak, peak_memory_bytes()),
        }
        write_json(self.path, {**cost, "finished": finished or self.finished, "recipe": self.recipe})
        return cost


class _JsonProgress(Progress):
    """Progress as lines of JSON."""

    def __init__(self, send: Send) -> None:
        self.send = send

    def start(self, task: str, total: int) -> None:
        """Send the task."""
        self.send({"task": task, "total": total, "memory": peak_memory_bytes()})

    def advance(self, steps: int = 1) -> None:
        """Send the steps."""
        self.send({"steps": steps, "memory": peak_memory_bytes()})

    def finish(self) -> None:
        """Send the end of the task."""
        self.send({"task": None})


if __name__ == "__main__":
    # the parent decodes UTF-8 lines, and a child of this process must not hold the pipes
    sys.exit(main(sys.argv[1:], sys.stdin))
