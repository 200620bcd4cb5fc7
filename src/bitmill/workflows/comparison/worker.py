"""The process that does the work of one cell: `python -m bitmill.workflows.comparison.worker DIR NAME`.

Each cell has a process of its own, so that its peak memory is its own, and running out of memory ends it alone.
DIR holds `grid.json`; NAME is a cell's, or `float` for the float model. On stdout go lines of JSON: progress,
and last the result or the reason why there is none. The process ends when its stdin does, which is when whoever
started it is gone.
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

from bitmill.checkpoint.files import folder_bytes, write_json
from bitmill.checkpoint.record import record_measurement
from bitmill.checkpoint.writer import work_of
from bitmill.data.text import windows_hash
from bitmill.errors import BitmillError, CheckpointError
from bitmill.evaluation.generate import chat_prompt, encode, generate
from bitmill.evaluation.metrics import score_windows
from bitmill.models.block_call import output_fn
from bitmill.progress import Progress, peak_memory_bytes
from bitmill.recipes.recipe import Recipe
from bitmill.report.describe import split_layers
from bitmill.tasks.causal_lm import CausalLM
from bitmill.workflows import quantize as quantizing
from bitmill.workflows.comparison.cells import FLOAT, Grid
from bitmill.workflows.comparison.process import end_with
from bitmill.workflows.comparison.reference import Recorded, Recorder
from bitmill.workflows.load import load, load_tokenizer
from bitmill.workflows.sizes import stored_bits

GRID_FILE = "grid.json"
FLOAT_FILE = "float.npy"
STATISTICS = "statistics"

Say = Callable[[dict[str, Any]], None]


def main(arguments: list[str], stdin: TextIO | None = None, stdout: TextIO | None = None) -> int:
    """Do one cell; 0 when it has a result."""
    folder, name = Path(arguments[0]), arguments[1]
    out = stdout or sys.stdout
    if stdin is not None:
        threading.Thread(target=end_with, args=(stdin,), daemon=True).start()

    def say(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=out, flush=True)

    with contextlib.redirect_stdout(sys.stderr):  # what libraries print
        try:
            document = json.loads((folder / GRID_FILE).read_text(encoding="utf-8"))
            grid = Grid.from_dict(document["grid"])
            torch.set_num_threads(document["terms"]["machine"]["threads"])
            work = _Work(folder, grid, document, _Told(say))
            say({"result": work.float_row() if name == FLOAT else work.variant(name)})
        except BitmillError as error:
            say({"failed": str(error)})
            return error.exit_code
        except Exception as error:
            traceback.print_exc()
            said = " ".join(str(error).split())[:300].rstrip(".")
            say({"failed": f"Unexpected {type(error).__name__}" + (f": {said}." if said else ".")})
            return 70
    return 0


class _Work:
    """The steps of a cell, and what they share."""

    def __init__(self, folder: Path, grid: Grid, document: dict[str, Any], progress: Progress) -> None:
        self.folder, self.grid, self.progress = folder, grid, progress
        self.keep = bool(document.get("keep_models"))
        self.held_out = document["terms"]["settings"]["evaluation"]["sha256"]

    def float_row(self) -> dict[str, Any]:
        """Measure the float model, and keep what it predicts for the variants."""
        bits, size = stored_bits(self.grid.model, self.grid.trust_remote_code)
        windows, tokenizer = self._windows(self.grid.model)
        model = load(self.grid.model, **self._loading())
        recorder = Recorder(self.folder / FLOAT_FILE, output_fn(model), windows)
        measured = score_windows(recorder, windows, None, self.progress, batch=1)
        recorder.keep()
        return {
            "bits_per_weight": bits,
            "size_bytes": size,
            **measured,
            "samples": self._answers(model, tokenizer),
        }

    def variant(self, name: str) -> dict[str, Any]:
        """Quantize a cell into `cells/NAME`, measure it against the float model, let it answer the prompts."""
        (cell,) = (cell for cell in self.grid.cells if cell.name == name)
        assert cell.recipe is not None
        out = self.folder / "cells" / name
        state = out.with_name(name + ".state")
        if not out.exists() and not work_of(out).exists():
            state.unlink(missing_ok=True)  # the work that it counts is gone
        strange = not state.exists()  # nothing is there, or work that nobody has counted
        clock = _Clock(state, self.progress, cell.recipe)
        if strange or clock.other:  # or on a recipe that the cell no longer has
            shutil.rmtree(out, ignore_errors=True)
            shutil.rmtree(work_of(out), ignore_errors=True)
        try:
            outcome = quantizing.quantize(
                self.grid.model,
                Recipe.from_dict(cell.recipe),
                out=out,
                calibration=self.grid.calibration,
                measure=0,
                device=self.grid.device,
                resume=True,
                trust_remote_code=self.grid.trust_remote_code,
                propagate=self.grid.propagate,
                statistics=self.folder / STATISTICS if self.grid.propagate == "float" else None,
                progress=clock,
            )
        finally:
            if not out.exists() and not work_of(out).exists():
                state.unlink(missing_ok=True)  # it failed before there was any work
        cost = clock.stop(finished=True)
        size = folder_bytes(out)
        windows, tokenizer = self._windows(out)
        model = load(out, dense=True, **self._loading())
        recorded = Recorded(self.folder / FLOAT_FILE, windows)
        measured = score_windows(output_fn(model), windows, recorded, self.progress, batch=1)
        reference = measured.pop("reference_perplexity")
        samples = self._answers(model, tokenizer)
        del model
        if self.keep:
            terms = {"text": self.grid.calibration.source, "split": "eval", "seqlen": windows.shape[1]}
            against = {"reference": self.grid.model, "reference_perplexity": reference}
            record_measurement(out, {**measured, **terms, "windows": len(windows), **against})
        else:
            shutil.rmtree(out)
        clock.path.unlink(missing_ok=True)
        inside, _ = split_layers(outcome.report)
        layers = [{key: layer[key] for key in _LAYER_KEYS} for layer in inside]
        return {
            "bits_per_weight": outcome.summary["bits_per_weight"],
            "size_bytes": size,
            **measured,
            **cost,
            "layers": layers,
            "samples": samples,
        }

    def _windows(self, model: str | Path) -> tuple[Any, Any]:
        """The held-out windows and the tokenizer that made them."""
        self.progress.start("reading text and model", 0)
        tokenizer = load_tokenizer(model, trust_remote_code=self.grid.trust_remote_code)
        terms = self.grid.calibration
        windows = CausalLM().windows(terms.source, tokenizer).held_out("eval", terms.seqlen, self.grid.windows)
        if windows_hash(windows) != self.held_out:
            raise CheckpointError(
                f"The tokenizer of {model} or the text {terms.source!r} is no longer what it was when the "
                "comparison began, so that results would not compare; choose another folder with -o."
            )
        return windows, tokenizer

    def _answers(self, model: Any, tokenizer: Any) -> list[dict[str, Any]]:
        """Greedy answers to the prompts, as a chat where the tokenizer has a template."""
        self.progress.start("answer", len(self.grid.prompts))
        answers = []
        for prompt in self.grid.prompts:
            if getattr(tokenizer, "chat_template", None):
                ids = chat_prompt(tokenizer, [{"role": "user", "content": prompt}])
            else:
                ids = encode(tokenizer, prompt)
            done = generate(model, tokenizer, ids, max_new_tokens=self.grid.max_new_tokens)
            answers.append({"text": done.text, "new_tokens": done.new_tokens, "stopped": done.stopped})
            self.progress.advance()
        self.progress.finish()
        return answers

    def _loading(self) -> dict[str, Any]:
        return {"device": self.grid.device, "trust_remote_code": self.grid.trust_remote_code}


_LAYER_KEYS = ("name", "format", "shape", "bits_per_weight", "size_bytes", "weight_error", "output_error")


class _Clock(Progress):
    """Counts the time and the memory that quantizing takes, over all the processes that took part in it.

    Noted after every block, as the blocks are: a run that was killed and resumed is charged for each block once.
    other: whether what was noted is the work on another recipe, which this one is not charged for.
    """

    def __init__(self, path: Path, inner: Progress, recipe: dict[str, Any]) -> None:
        self.path, self.inner, self.recipe = path, inner, json.loads(json.dumps(recipe))
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.other = before.get("recipe", self.recipe) != self.recipe
        if self.other:
            before = {}
        self.time_s = float(before.get("quantize_time_s", 0.0))
        self.peak = int(before.get("peak_memory_bytes", 0))
        self.finished = bool(before.get("finished"))  # what follows is not quantizing
        self.started = time.perf_counter()
        self.stop()  # a run that ends in its first block has said what it worked on

    def start(self, task: str, total: int) -> None:
        self.inner.start(task, total)

    def advance(self, steps: int = 1) -> None:
        self.stop()
        self.inner.advance(steps)

    def finish(self) -> None:
        self.inner.finish()

    def stop(self, finished: bool = False) -> dict[str, Any]:
        """Note and return the time and the memory until now."""
        elapsed = 0.0 if self.finished else time.perf_counter() - self.started
        cost = {
            "quantize_time_s": round(self.time_s + elapsed, 3),
            "peak_memory_bytes": self.peak if self.finished else max(self.peak, peak_memory_bytes()),
        }
        write_json(self.path, {**cost, "finished": finished or self.finished, "recipe": self.recipe})
        return cost


class _Told(Progress):
    """Progress as lines of JSON."""

    def __init__(self, say: Say) -> None:
        self.say = say

    def start(self, task: str, total: int) -> None:
        self.say({"task": task, "total": total, "memory": peak_memory_bytes()})

    def advance(self, steps: int = 1) -> None:
        self.say({"steps": steps, "memory": peak_memory_bytes()})

    def finish(self) -> None:
        self.say({"task": None})


if __name__ == "__main__":
    # what reads the other end knows no other text, and a child of this process must not hold the pipes
    sys.exit(main(sys.argv[1:], sys.stdin))
