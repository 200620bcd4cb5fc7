"""Compare methods: the Python function, and the equivalent command line for the record."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from bitmill.config.arguments import checked_arguments, renamed_arguments
from bitmill.config.paths import user_path
from bitmill.config.texts import MIX
from bitmill.data.text import TextSource
from bitmill.data.windows import CalibrationData, as_calibration, source_name
from bitmill.errors import UsageError
from bitmill.evaluation.answers import NEW_TOKENS, PROMPTS
from bitmill.pipeline.job import Propagate
from bitmill.progress import Progress
from bitmill.recipes.compose import HeadBits
from bitmill.report.pictures import PictureResults
from bitmill.report.results import Results
from bitmill.sources.open import open_source
from bitmill.tasks.base import task_of
from bitmill.workflows.budget.run import budget_recipes
from bitmill.workflows.comparison.grid import Grid, Options, plan_variants, recipe_variant
from bitmill.workflows.comparison.pictures import compare_pictures
from bitmill.workflows.comparison.run import run_grid
from bitmill.workflows.evaluate import usual_windows
from bitmill.workflows.prepared_tasks import LIMIT
from bitmill.workflows.ray_tasks import check_address


@renamed_arguments(calibration="calib")
@checked_arguments("calib", "text", "progress", "head_bits")
def compare(
    model: str | Path,
    methods: Sequence[str] = (),
    bits: Sequence[int] = (),
    *,
    out: str | Path,
    recipes: Sequence[str | Path] = (),
    budgets: Sequence[str] = (),
    options: Options | None = None,
    calib: CalibrationData | str | Path | list[str] | None = None,
    text: TextSource | None = None,
    windows: int | None = None,
    prompts: Sequence[str] = PROMPTS,
    max_new_tokens: int = NEW_TOKENS,
    tasks: Sequence[str] = (),
    limit: int | None = LIMIT,
    run_code: bool = False,
    propagate: Propagate = "quantized",
    head_bits: HeadBits | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    keep_models: bool = False,
    ray: str | None = None,
    progress: Progress | None = None,
) -> Results | PictureResults:
    """Quantize a model by every method at every number of bits, measure each, and write a page about it.

    Every variant has its own process. One that fails, or that a method does not have, is a row with a reason. A
    vision model is compared on folders of pictures, one variant after another, without prompts.

    Args:
        out: folder; a comparison that it already holds in part is continued.
        recipes: recipe files, one variant each.
        budgets: such as "3.0bpw" or "70MB", one variant each, of a format for every layer; not verified before, as
            the comparison measures them.
        options: of each method by name, such as {"gptq": {"damp": 0.05}}.
        text: text to measure on, such as "suite"; the held-out part of the calibration text without it.
        windows: held-out windows to measure on, of each domain for suite and mix; 40, or 8 of each domain, without
            it.
        prompts: answered by every variant, greedily, in at most `max_new_tokens` tokens.
        tasks: benchmark tasks that every variant and the float model are measured on, see docs/tasks.md.
        limit: first documents of each task; None for all.
        run_code: run the programs that variants write for humaneval and mbpp, in a sandbox.
        propagate: inputs for calibrating later blocks: the outputs of the quantized blocks, or those of the float
            blocks, whose statistics are collected once for all variants.
        head_bits: bits of every variant's embedding and output head, 8, 6 or 4, or "float"; 8 by default.
        keep_models: keep the quantized folders in `out`/cells.
        ray: run variants as tasks of a Ray cluster: "local" for one of this machine, or the address of another one
            whose nodes share the folder, see docs/ray.md.

    Raises:
        BitmillError: a subclass, for errors that concern all variants.
    """
    check_address(ray)
    out = user_path(out)
    calibration = _text_calibration(calib)
    measured = None if text is None else CalibrationData(text).source
    if windows is None:
        windows = usual_windows(calibration.source if measured is None else measured)
    variants = plan_variants(methods, bits, recipes, options, head_bits)
    if budgets:
        planned = budget_recipes(
            model,
            budgets,
            calibration,
            propagate,
            head_bits,
            device,
            trust_remote_code,
            progress or Progress(),
            ray,
        )
        variants += tuple(recipe_variant(recipe) for recipe in planned)
    grid = Grid(
        str(model),
        variants,
        calibration,
        windows,
        measured,
        tuple(prompts),
        max_new_tokens,
        tuple(tasks),
        limit,
        run_code,
        propagate,
        device,
        trust_remote_code,
    )
    selection = [
        ("--methods", ",".join(methods), ""),
        ("--bits", ",".join(str(count) for count in bits), ""),
        ("--recipes", ",".join(str(path) for path in recipes), ""),
        ("--budgets", ",".join(budgets), ""),
        *(("--set", f"{m}.{key}={value}", "") for m, of in (options or {}).items() for key, value in of.items()),
    ]
    rest = [("--head-bits", head_bits, None), ("--device", device, "cpu"), ("-o", out.name, None)]
    command = _command(grid, selection, rest) + ["--keep-models"] * keep_models
    grid = replace(grid, command=shlex.join(command))
    task = task_of(open_source(grid.model, trust_remote_code=trust_remote_code))
    if task.reads == "pictures":
        if ray is not None:
            raise UsageError(f"{model} reads pictures, and its variants share their data; compare it without Ray.")
        return compare_pictures(grid, out, keep_models=keep_models, progress=progress)
    return run_grid(grid, out, keep_models=keep_models, ray=ray, progress=progress)


def _text_calibration(calib: CalibrationData | str | Path | list[str] | None) -> CalibrationData:
    """Return the calibration text. Raises UsageError for token windows."""
    given = as_calibration(calib)
    if isinstance(given, Tensor):
        raise UsageError("A comparison measures on text, so token windows cannot calibrate it; name a text.")
    return given or CalibrationData()


_Flags = Sequence[tuple[str, object, object]]  # flag, value, default


def _command(grid: Grid, selection: _Flags, rest: _Flags) -> list[str]:
    """Return the words of the command line; flags at their defaults are left out."""
    calibration = grid.calibration
    flags: list[tuple[str, object, object]] = [
        *selection,
        ("--calib", calibration.name, MIX),
        ("--samples", calibration.samples, None),
        ("--seqlen", calibration.seqlen, None),
        ("--seed", calibration.seed, 0),
        ("--text", None if grid.text is None else source_name(grid.text), None),
        ("--windows", grid.windows, None),
        ("--max-new-tokens", grid.max_new_tokens, NEW_TOKENS),
        ("--tasks", ",".join(grid.tasks), ""),
        ("--limit", grid.limit or 0, LIMIT),
        ("--propagate", grid.propagate, "quantized"),
        *rest,
    ]
    words = [word for flag, value, default in flags if value != default for word in (flag, str(value))]
    words += ["--run-code"] * grid.run_code + ["--trust-remote-code"] * grid.trust_remote_code
    return ["bitmill", "compare", grid.model, *words]
