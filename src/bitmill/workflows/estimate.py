"""Estimate time, memory and size of a quantization without doing it."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from torch import Tensor, nn

from bitmill.calibration.token_windows import JobData
from bitmill.checkpoint.writer import FolderSink
from bitmill.config.arguments import checked_arguments
from bitmill.data.windows import CalibrationData, as_calibration
from bitmill.errors import UsageError, is_out_of_memory
from bitmill.files import file_records, folder_bytes
from bitmill.formats import Format
from bitmill.kv.config import FLOAT, SAMPLES, parse_kv_config
from bitmill.models.meta import trim_malloc
from bitmill.models.trial import try_block_kinds
from bitmill.pipeline.job import Propagate
from bitmill.progress import Progress, peak_memory_bytes
from bitmill.progress.terminal import displayed
from bitmill.recipes.compose import HeadBits
from bitmill.recipes.method import Method
from bitmill.recipes.recipe import Recipe
from bitmill.recipes.rules import Rule
from bitmill.workflows.cost import Clock, Cost, PeakMemory
from bitmill.workflows.folder_size import ProbedFolder, folder_size
from bitmill.workflows.prepare import (
    PreparedJob,
    QuantizeRequest,
    RecipeChanges,
    prepare_job,
    read_data,
    windows_to_measure,
    with_calibrated_attention,
)
from bitmill.workflows.probe import (
    Kinds,
    MemorySink,
    ProbeSink,
    kinds_of,
    probe_folder,
    try_blocks,
    try_measuring,
)
from bitmill.workflows.running_cost import repeated_model, running_cost


@dataclass(frozen=True)
class Estimate:
    """What a quantization will take on this machine, as it is busy now.

    Attributes:
        method: name of the recipe.
        bits_per_weight: of the blocks' linears.
        seconds: from the call to its end.
        cpu_seconds: of all processors together; other work on the machine changes it little.
        peak_memory_bytes: highest resident memory of the process.
        size_bytes: of all files of the folder, or of the packed tensors of a live module.
        probe_seconds: that the estimate took beyond opening the model and reading the text.
        block_seconds: of `seconds`, those in the loop over the blocks.
    """

    method: str
    bits_per_weight: float
    seconds: float
    cpu_seconds: float
    peak_memory_bytes: int
    size_bytes: int
    probe_seconds: float
    block_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Return (name, value) pairs to print."""
        return [
            ("method", self.method),
            ("bits per weight", f"{self.bits_per_weight:.3f}"),
            ("file size", f"{self.size_bytes / 1e6:,.1f} MB"),
            ("time", f"about {describe_duration(self.seconds)}, as busy as this machine is now"),
            ("peak memory", f"about {self.peak_memory_bytes / 1e9:.2f} GB"),
            ("written", "nothing (estimate)"),
        ]

    def __str__(self) -> str:
        return (
            f"{self.method}, {self.bits_per_weight:.3f} bits per weight: {self.size_bytes / 1e6:,.1f} MB, about "
            f"{describe_duration(self.seconds)} and {self.peak_memory_bytes / 1e9:.1f} GB of memory here"
        )


def describe_duration(seconds: float) -> str:
    """Return a duration in words: seconds below two minutes, minutes below three hours, then hours."""
    if seconds < 120:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} minutes" if seconds < 3 * 3600 else f"{seconds / 3600:.1f} hours"


@checked_arguments("calib", "progress", "head_bits")
def estimate(
    model: str | Path | nn.Module,
    method: str | Path | Recipe | Method | None = None,
    *,
    calib: CalibrationData | Tensor | str | Path | list[str] | None = None,
    measure: int | None = None,
    device: str = "cpu",
    propagate: Propagate = "quantized",
    head_bits: HeadBits | None = None,
    rules: Sequence[str | Rule] = (),
    kv: str | None = None,
    kv_bits: int | None = None,
    kv_options: dict[str, Any] | None = None,
    kv_samples: int = SAMPLES,
    kv_seqlen: int | None = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    progress: Progress | bool | None = None,
    **options: Any,
) -> Estimate:
    """Estimate time, memory and size of `quantize` with these arguments; nothing is written.

    The recipe quantizes one block of each kind, with some of the calibration windows, into a temporary folder. The
    calibration of keys and values counts in the size alone.

    Args:
        model, method, calib, measure, device, propagate, head_bits, rules, kv, kv_bits, kv_options,
            kv_samples, kv_seqlen, tokenizer, trust_remote_code, options: as for `quantize`.
        progress: as for `quantize`.

    Raises:
        BitmillError: anything wrong with model, method or text, in one sentence.
    """
    kv_config = parse_kv_config(kv, kv_bits, kv_options, kv_samples, kv_seqlen)
    calibration = as_calibration(calib)
    with displayed(progress) as shown:
        request = QuantizeRequest(
            model, None, calibration, windows_to_measure(measure, calibration), device, False, False, True,
            propagate, None, kv_config, tokenizer, trust_remote_code, shown,
        )  # fmt: skip
        if method == FLOAT:
            raise UsageError("The method 'none' leaves weights as they are; there is nothing to estimate.")
        recipe, chosen = RecipeChanges(options, head_bits, tuple(rules)).choose(method)
        prepared = prepare_job(request, recipe, chosen)
        data, identity = read_data(prepared)
        prepared = with_calibrated_attention(prepared, data)
        return estimate_job(prepared, data, identity)


def estimate_job(prepared: PreparedJob, data: JobData, identity: dict[str, Any]) -> Estimate:
    """Estimate a job that has been prepared, with a recipe.

    Args:
        prepared: the job.
        data: the tokens that calibrate and that measure.
        identity: everything that decides the bytes of the result.
    """
    opening, before = prepared.request.cost(), peak_memory_bytes()
    prepared.request.progress.start("trying the recipe on one block", 0)
    clock = Clock()
    with clock.measure("probe"), tempfile.TemporaryDirectory(prefix="bitmill-") as temporary:
        probe = _Probe(prepared, data, identity, clock)
        total, memory, size = probe.live() if prepared.request.live else probe.folder(Path(temporary) / "out")
    gc.collect()  # models that hold themselves; their memory must not add to that of the run
    trim_malloc()
    prepared.request.progress.finish()
    total += Cost(*opening)
    return Estimate(
        prepared.plan["method"], prepared.plan["bits_per_weight"], total.seconds, total.cpu_seconds,
        max(before, memory), size, clock.costs["probe"].seconds, probe.block_seconds,
    )  # fmt: skip


class _Probe:
    """The trial of a job."""

    def __init__(self, prepared: PreparedJob, data: JobData, identity: dict[str, Any], clock: Clock) -> None:
        assert prepared.resolved is not None
        self.prepared, self.data, self.identity, self.clock = prepared, data, identity, clock
        self.streamed, self.resolved = prepared.streamed, prepared.resolved
        self.kinds: Kinds = kinds_of(self.streamed, self.resolved)
        self.block_seconds = 0.0
        self.quality: dict[str, Any] = {}

    def live(self) -> tuple[Cost, int, int]:
        """Return cost, peak memory and bytes of quantizing a live module in place."""
        cost, memory = self._blocks(MemorySink())
        return cost, memory, self.prepared.plan["size_bytes"]

    def folder(self, path: Path) -> tuple[Cost, int, int]:
        """Return cost, peak memory and bytes of writing a folder; `path` is one that is removed afterwards."""
        with ExitStack() as stack:
            with self.clock.measure("once"):
                files = stack.enter_context(probe_folder(path, self.prepared, self.identity))
            return self._in_folder(files)

    def _in_folder(self, files: FolderSink) -> tuple[Cost, int, int]:
        sink = ProbeSink(files)
        cost, memory = self._blocks(sink)
        with self.clock.measure("once"):
            files.formats = self._all_formats()
            files.complete(self.streamed)
        with self.clock.measure("digests"):
            records = file_records(files.folder)
        records = {name: record for name, record in records.items() if _is_final(name)}
        held = folder_bytes(files.folder)
        running, running_memory, record = self._running(sink)
        layers = [{"name": n, **layer.summary()} for result in sink.results for n, layer in result.layers.items()]
        size = folder_size(
            self.prepared, self.data, self.identity, ProbedFolder(records, layers, self.quality, record)
        )
        total = cost + self.clock.costs["once"] + self.clock.costs["digests"] * (size / held) + running
        return total, max(memory, running_memory), size

    def _all_formats(self) -> dict[str, Format]:
        """Return the formats in the order in which a run notes them: embedding and head first."""
        formats = self.resolved.formats
        outside = {name: formats[name] for name in self.resolved.head_layers}
        return outside | {name: format for name, format in formats.items() if name not in outside}

    def _blocks(self, sink: MemorySink) -> tuple[Cost, int]:
        """Return the cost of all blocks and of measuring, and the peak memory."""
        request = self.prepared.request
        reads_text = not request.live or request.measure > 0 or bool(self.resolved.needs)
        with self.clock.measure("once"):
            try_block_kinds(self.streamed, self.resolved.formats, reads_text)
        measuring = try_measuring(self.prepared, self.data, self.kinds)
        trial = try_blocks(self.prepared, self.data, self.kinds, sink)
        blocks = self.kinds.sum(trial.inside) + self.kinds.sum(measuring.inside)
        self.block_seconds, self.quality = blocks.seconds, measuring.quality
        return trial.outside + blocks + measuring.outside, max(trial.memory_bytes, measuring.memory_bytes)

    def _running(self, sink: MemorySink) -> tuple[Cost, int, dict[str, Any] | None]:
        """Return cost, peak memory and record of running the packed model; None where it is not run."""
        generates = self.streamed.task.generates and self.data.held_out is not None
        if not generates or self.prepared.plan["size_bytes"] > psutil.virtual_memory().available:
            return Cost(), 0, None
        try:
            with PeakMemory() as memory:
                with self.clock.measure("load"):
                    model = repeated_model(self.streamed, self.resolved, sink.results, self.kinds.like, sink.parts)
                assert self.data.held_out is not None
                cost, record = running_cost(model, self.data.held_out[0])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return Cost(), 0, None
        return self.clock.costs["load"] + cost, memory.size_bytes, record


def _is_final(name: str) -> bool:
    """Return True for a file of the folder whose bytes do not depend on the blocks that were probed."""
    return not name.endswith(".safetensors") and not name.endswith(".safetensors.index.json")
