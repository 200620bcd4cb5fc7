"""A job of `quantize` before its first block: the model open, the recipe resolved on it, the text read."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bitmill.calibration.token_windows import JobData, token_windows
from bitmill.config.texts import default_calibration
from bitmill.data.held_apart import hold_apart
from bitmill.data.mixture import is_mixture
from bitmill.data.text import windows_hash
from bitmill.data.windows import CalibrationData
from bitmill.errors import SourceError, UsageError
from bitmill.kv.config import KVConfig, parse_kv_config
from bitmill.models.kind import check_class_loads
from bitmill.models.stored import moved_on_load
from bitmill.models.streamed import StreamedModel
from bitmill.models.trial import leave_read_weights
from bitmill.pipeline.attention import calibrate_attention
from bitmill.pipeline.job import Propagate
from bitmill.pipeline.network import recipe_of_network
from bitmill.progress import Progress
from bitmill.recipes.compose import HeadBits, compose
from bitmill.recipes.method import Method
from bitmill.recipes.recipe import Recipe
from bitmill.recipes.resolve import ResolvedRecipe, resolve_recipe
from bitmill.recipes.rules import Rule
from bitmill.report.describe import describe_source_types
from bitmill.sources.open import open_source
from bitmill.workflows import kv as kv_workflow
from bitmill.workflows.checks import check_device, choose_recipe, job_identity
from bitmill.workflows.free_memory import check_block_fits
from bitmill.workflows.sizes import storage_plan

WINDOWS, WINDOWS_PER_DOMAIN = 4, 1  # to measure on where no number is given


def windows_to_measure(measure: int | None, calibration: CalibrationData | Tensor | None) -> int:
    """Return the number of held-out windows, of each domain for a mixture; a default where none is given."""
    if measure is not None:
        return measure
    source = default_calibration() if calibration is None else getattr(calibration, "source", None)
    return WINDOWS_PER_DOMAIN if is_mixture(source) else WINDOWS


@dataclass(frozen=True)
class RecipeChanges:
    """The arguments of `quantize` that change the recipe."""

    options: dict[str, Any]
    head_bits: HeadBits | None
    rules: tuple[str | Rule, ...]

    def choose(self, method: str | Path | Recipe | Method | None) -> tuple[Recipe, dict[str, str]]:
        """Return the recipe, and the summary's entry `chosen` where no method was named."""
        recipe, chosen = choose_recipe(method, self.options, self.head_bits)
        return (compose(recipe, rules=self.rules) if self.rules else recipe), chosen

    @property
    def given(self) -> bool:
        """True where anything is changed."""
        return bool(self.options or self.head_bits or self.rules)


@dataclass(frozen=True)
class QuantizeRequest:
    """The arguments of `quantize` but for those of the recipe."""

    model: str | Path | nn.Module
    out: Path | None
    calibration: CalibrationData | Tensor | None
    measure: int
    device: str
    resume: bool
    overwrite: bool
    dry_run: bool
    propagate: Propagate
    statistics: Path | None
    kv: KVConfig | None
    tokenizer: Any
    trust_remote_code: bool
    progress: Progress
    held_apart: int = 0  # last calibration windows that must not calibrate
    started: float = field(default_factory=time.perf_counter)
    cpu_started: float = field(default_factory=time.process_time)

    def __post_init__(self) -> None:
        if self.measure < 0:
            raise UsageError(f"measure is {self.measure}; use 0 or a positive number of windows.")
        check_device(self.device)

    def cost(self) -> tuple[float, float]:
        """Return the seconds since the start, on the clock and of all processors together."""
        return time.perf_counter() - self.started, time.process_time() - self.cpu_started

    @property
    def live(self) -> bool:
        """True for a live module."""
        return isinstance(self.model, nn.Module)

    def check_output(self) -> None:
        """Raise UsageError when the result has no place to go."""
        if self.out is None and not self.dry_run and (self.kv is not None or not self.live):
            raise UsageError("Nowhere to write: give an output folder with out=....")


def with_kv(request: QuantizeRequest, recipe: Recipe | None) -> QuantizeRequest:
    """Return a request with the KV method of its recipe, where it names none itself."""
    if request.kv is not None or recipe is None or recipe.kv is None:
        return request
    return replace(request, kv=parse_kv_config(recipe.kv))


FLOAT_SHARE = 0.01  # of the weights of the blocks that may stay in float without a note


@dataclass(frozen=True)
class PreparedJob:
    """A job with its model open: the recipe on it, the sizes it will have, and the KV calibration to add."""

    request: QuantizeRequest
    streamed: StreamedModel
    resolved: ResolvedRecipe | None
    kv: kv_workflow.KVCalibrationJob | None
    plan: dict[str, Any]

    @property
    def kv_bytes(self) -> int:
        """The bytes of the calibration of keys and values; 0 without one."""
        return int(self.kv.plan["size_bytes"]) if self.kv else 0

    @property
    def recipe(self) -> Recipe | None:
        """The recipe; None where the weights stay as they are."""
        return self.resolved.recipe if self.resolved else None


def prepare_job(request: QuantizeRequest, recipe: Recipe | None, chosen: dict[str, Any]) -> PreparedJob:
    """Open the model, resolve the recipe on it and compute the sizes of the result."""
    request.progress.start("opening the model", 0)
    source = open_source(request.model, trust_remote_code=request.trust_remote_code, tokenizer=request.tokenizer)
    if request.out is not None and request.live and not source.config.model_type:
        raise UsageError(
            f"{type(request.model).__name__} has no transformers config (no model_type), so no folder of it could "
            "be loaded again; leave out=... away to quantize it in place."
        )
    streamed = StreamedModel(source, request.device)
    check_block_fits(streamed, request.device)
    if source_types := [asdict(stored) for stored in source.stored_types()]:
        request.progress.note(f"{source.name} {describe_source_types(source_types)}")
    if request.out is not None and isinstance(request.model, nn.Module):
        check_class_loads(request.model, source, streamed.task)
    if recipe is None and (moved := moved_on_load(streamed.model, streamed.names())):
        raise SourceError(
            f"transformers would rename {moved!r} of {source.name} when it loads a copy, so its weights cannot be "
            "left as they are; quantize them too."
        )
    if streamed.unused:
        request.progress.note(
            f"{len(streamed.unused)} stored tensors are left out, as {type(streamed.model).__name__} does not "
            f"use them, such as {streamed.unused[0]}"
        )
    if recipe is not None:
        leave_read_weights(streamed)
    share, names = streamed.float_matrices()
    if recipe is not None and share > FLOAT_SHARE:
        request.progress.note(
            f"{share:.1%} of the weights of the blocks stay in float, because they belong to no linear layer that "
            f"can be packed: {', '.join(names[:4])}{' and others' if len(names) > 4 else ''}"
        )
        chosen = {**chosen, "float_matrices": {"share": share, "names": names}}
    kv = kv_workflow.KVCalibrationJob(request.kv, streamed) if request.kv is not None else None
    resolved = None
    if recipe is not None:
        resolve_recipe(recipe, streamed)  # refuses what does not fit before weights are read
        resolved = resolve_recipe(recipe_of_network(recipe, streamed, request.progress), streamed)
    plan = storage_plan(streamed, resolved, kv.plan["size_bytes"] if kv else 0)
    return PreparedJob(
        request,
        streamed,
        resolved,
        kv,
        {**chosen, **plan, "source_types": source_types, "kv": kv.plan if kv else None},
    )


def _apart(data: JobData, count: int) -> JobData:
    """Return the data without the last `count` calibration windows, and without those that overlap them."""
    assert data.windows is not None
    kept, _ = hold_apart(data.windows, count)
    entry = {**data.described["calibration"], "held_apart": count, "sha256": windows_hash(kept)}
    return replace(data, windows=kept, described={**data.described, "calibration": entry})


def with_calibrated_attention(prepared: PreparedJob, data: JobData) -> PreparedJob:
    """Return the job with the static parameters of attention in its recipe, where it has such."""
    recipe = prepared.recipe
    if recipe is None or recipe.attention is None or not recipe.attention.static or data.windows is None:
        return prepared
    assert prepared.resolved is not None
    attention = calibrate_attention(prepared.streamed, recipe.attention, data.windows, prepared.request.progress)
    resolved = replace(prepared.resolved, recipe=replace(recipe, attention=attention))
    return replace(prepared, resolved=resolved)


def read_data(prepared: PreparedJob) -> tuple[JobData, dict[str, Any]]:
    """Load the tokens that calibrate and measure; returns them and the identity of the job."""
    request, recipe, source = prepared.request, prepared.recipe, prepared.streamed.source
    request.progress.start("reading text and model", 0)
    calibrates = prepared.resolved is not None and bool(prepared.resolved.needs)
    measure = request.measure if recipe is not None else 0
    data = token_windows(source, request.calibration, calibrates, measure, request.device, request.progress)
    if request.held_apart and data.windows is not None:
        data = _apart(data, request.held_apart)
    if prepared.kv:
        prepared.kv.prepare(request.calibration, request.progress)
    kv_plan = prepared.kv.plan if prepared.kv else None
    return data, job_identity(source, recipe, data, request.device, request.propagate, kv_plan)
