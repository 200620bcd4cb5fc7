"""The real KL divergence of plans, measured on calibration windows that are held apart."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitmill.calibration.token_windows import JobData
from bitmill.config.documents import read_json_object
from bitmill.data.text import windows_hash
from bitmill.errors import CalibrationError, NumericsError
from bitmill.files import make_folder, output_errors, write_text
from bitmill.models.streamed import StreamedModel
from bitmill.pipeline import BlockResult, Job, run
from bitmill.pipeline.job import Propagate, Shared
from bitmill.progress import Progress
from bitmill.recipes.recipe import Recipe
from bitmill.recipes.resolve import resolve_recipe
from bitmill.version import __version__
from bitmill.workflows.budget.plan import Plan

_LIMIT_BYTES = 1 << 20


class DiscardSink:
    """A sink that keeps nothing: the blocks only matter for the hidden states that pass them."""

    work: Path | None = None

    def finished(self, index: int) -> BlockResult | None:
        """Return None: nothing is kept between runs."""
        return None

    def write(self, result: BlockResult, streamed: StreamedModel) -> None:
        """Drop a finished block."""

    def shared(self) -> Shared | None:
        """Return None: nothing is kept between runs."""
        return None

    def share(self, parts: Shared) -> None:
        """Drop the parts that layers share."""


@dataclass
class Verifier:
    """Quantizes a model by the recipe of a plan, as the final run does, and measures it.

    Attributes:
        streamed: the float model.
        data: windows that calibrate, and held-apart ones as `held_out`.
        propagate: as for `quantize`.
        folder: keeps what was measured, and with propagate="float" the statistics.
        progress: where progress is reported.
        measured: what was measured, in order, as plain data.
    """

    streamed: StreamedModel
    data: JobData
    propagate: Propagate
    folder: Path
    progress: Progress
    measured: list[dict[str, Any]] = field(default_factory=list)

    def measure(self, plan: Plan) -> float:
        """Return the KL divergence of a plan in nats per token; infinite where it is not finite."""
        kl = self._known(plan.recipe)
        if kl is None:
            kl = self._measure(plan.recipe)
            with output_errors(self.folder):
                make_folder(self.folder)
                write_text(self._file(plan.recipe), json.dumps({"kl_divergence": None if math.isinf(kl) else kl}))
        self.measured.append({**plan.describe(), "measured_kl": kl})
        return kl

    def _measure(self, recipe: Recipe) -> float:
        statistics = self.folder if self.propagate == "float" else None
        job = Job(self.streamed, resolve_recipe(recipe, self.streamed), self.data, self.propagate, statistics)
        try:
            return float(run(job, DiscardSink(), self.progress)["kl_divergence"])
        except NumericsError:  # the quantized model has no finite loss
            return math.inf

    def _known(self, recipe: Recipe) -> float | None:
        """Return what an earlier run has measured of a recipe, None for nothing."""
        path = self._file(recipe)
        if not path.exists():
            return None
        kl = read_json_object(path, CalibrationError, _LIMIT_BYTES, f"delete {path}").get("kl_divergence", "")
        if kl is not None and (not isinstance(kl, (int, float)) or isinstance(kl, bool)):
            raise CalibrationError(f"{path} holds no KL divergence; delete it.")
        return math.inf if kl is None else float(kl)

    def _file(self, recipe: Recipe) -> Path:
        assert self.data.windows is not None
        assert self.data.held_out is not None
        plain = {key: value for key, value in recipe.to_dict().items() if key != "name"}
        windows = [windows_hash(self.data.windows), windows_hash(self.data.held_out)]
        known = json.dumps([__version__, self.propagate, windows, plain], sort_keys=True)
        return self.folder / f"verified-{hashlib.sha256(known.encode()).hexdigest()[:16]}.json"
