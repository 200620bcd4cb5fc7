"""Compare methods: the Python function, and the command that a user would type for it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from bitmill.data.windows import CalibrationData
from bitmill.pipeline.job import Propagate
from bitmill.progress import Progress
from bitmill.report.results import Results
from bitmill.workflows.comparison.cells import NEW_TOKENS, PROMPTS, Grid, Options, plan_cells
from bitmill.workflows.comparison.run import run_grid


def compare(
    model: str | Path,
    methods: Sequence[str] = (),
    bits: Sequence[int] = (),
    *,
    out: str | Path,
    recipes: Sequence[str | Path] = (),
    options: Options | None = None,
    calibration: CalibrationData | None = None,
    windows: int = 40,
    prompts: Sequence[str] = PROMPTS,
    max_new_tokens: int = NEW_TOKENS,
    propagate: Propagate = "quantized",
    head_bits: int | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    keep_models: bool = False,
    progress: Progress | None = None,
) -> Results:
    """Quantize `model` by every method at every number of bits, measure each result, and write a page about it.

    out: a folder; where it holds a part of the comparison already, the rest is done.
    recipes: recipe files, one variant each.
    options: of each method by name, such as {"gptq": {"damp": 0.05}}.
    windows: held-out windows to measure on.
    prompts: what every variant is to answer, greedily, in at most `max_new_tokens` tokens.
    propagate: what later blocks are calibrated on: the quantized blocks' outputs, or the float model's, whose
        statistics are then collected once for all variants.
    head_bits: of every variant's embedding and output head, 8, 6 or 4; they stay in float without it.
    keep_models: leave the quantized folders in `out`/cells.

    Every variant has a process of its own. One that fails, or that a method does not offer, is a row with a
    reason. Raises BitmillError subclasses for what concerns all of them.
    """
    calibration = calibration or CalibrationData()
    command = ["bitmill", "compare", str(model)]
    for name, given, usual in (
        ("--methods", ",".join(methods), ""),
        ("--bits", ",".join(str(count) for count in bits), ""),
        ("--recipes", ",".join(str(path) for path in recipes), ""),
        *(("--set", f"{m}.{key}={value}", "") for m, of in (options or {}).items() for key, value in of.items()),
        ("--calib", calibration.source, "pydoc"),
        ("--samples", calibration.samples, None),
        ("--seqlen", calibration.seqlen, None),
        ("--seed", calibration.seed, 0),
        ("--windows", windows, None),
        ("--max-new-tokens", max_new_tokens, NEW_TOKENS),
        ("--propagate", propagate, "quantized"),
        ("--head-bits", head_bits, None),
        ("--device", device, "cpu"),
        ("-o", Path(out).name, None),
    ):
        if given != usual:
            command += [name, str(given)]
    command += ["--trust-remote-code"] * trust_remote_code + ["--keep-models"] * keep_models
    grid = Grid(
        str(model),
        plan_cells(methods, bits, recipes, options, head_bits),
        calibration,
        windows,
        tuple(prompts),
        max_new_tokens,
        propagate,
        device,
        trust_remote_code,
        shlex.join(command),
    )
    return run_grid(grid, Path(out), keep_models=keep_models, progress=progress)
