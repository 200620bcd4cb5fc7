"""bitmill quantize."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitmill.cli.complete import (
    complete_calib,
    complete_format,
    complete_method,
    complete_solver,
    complete_transform,
    complete_tuner,
)
from bitmill.cli.options import (
    AsJson,
    Device,
    HeadBits,
    Kv,
    KvBits,
    KvSamples,
    KvSeqlen,
    KvSet,
    MethodSettings,
    Model,
    Propagate,
    Ray,
    Samples,
    Seed,
    Seqlen,
    TrustRemoteCode,
    kv_arguments,
    parse_head_bits,
    parse_method_options,
    split_list,
)
from bitmill.cli.output import command_output, property_table
from bitmill.config.texts import MIX, VARIABLE
from bitmill.errors import UsageError
from bitmill.recipes.defaults import WITHIN_MINUTES

if TYPE_CHECKING:
    from bitmill.recipes.recipe import Recipe

NONE = "none"  # the method that leaves weights as they are

Out = Annotated[
    Path | None,
    typer.Option(
        "-o", "--out", help="Folder to write; without it MODEL-METHOD-BITSbit in this folder.", show_default=False
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace a folder that bitmill wrote, once the new one is complete."),
]
MethodName = Annotated[
    str | None,
    typer.Option(
        help="Named method or recipe (see bitmill methods, bitmill recipes), or a .yaml file; without it the best "
        "method of the leaderboard at these bits; none leaves the weights as they are, for --kv alone.",
        autocompletion=complete_method,
        show_default=False,
    ),
]
Bits = Annotated[str | None, typer.Option(metavar="B", help="Short for --set bits=B.", show_default=False)]
GroupSize = Annotated[
    str | None,
    typer.Option(
        metavar="G",
        help="Short for --set group_size=G: input columns that share a scale, row (-1) or tensor (0).",
        show_default=False,
    ),
]
Type = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE",
        help="Short for --set type=TYPE: block type of the method gguf, such as Q4_K.",
        show_default=False,
    ),
]
FormatPart = Annotated[
    str | None,
    typer.Option(
        metavar="PART",
        help="Weight format in place of the method's, NAME or NAME:key=value,...",
        autocompletion=complete_format,
        show_default=False,
    ),
]
SolverPart = Annotated[
    str | None,
    typer.Option(
        metavar="PART", help="Solver in place of the method's.", autocompletion=complete_solver, show_default=False
    ),
]
Transforms = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PART",
        help="Additional transform; repeatable.",
        autocompletion=complete_transform,
        show_default=False,
    ),
]
Tuners = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PART", help="Additional tuner; repeatable.", autocompletion=complete_tuner, show_default=False
    ),
]
Sparse = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="Share of the weights, the largest, stored separately in 16 bits.",
        show_default=False,
    ),
]
InputsPart = Annotated[
    str | None,
    typer.Option(
        metavar="PART",
        help="Format of the inputs of linear layers, NAME or NAME:key=value,..., such as uniform:bits=8; float.",
        autocompletion=complete_format,
        show_default=False,
    ),
]
AttentionParts = Annotated[
    list[str] | None,
    typer.Option(
        "--attention",
        metavar="SITE=PART",
        help="Format of what attention multiplies: queries, keys, values or probabilities, such as "
        "keys=uniform:bits=8; repeatable.",
        show_default=False,
    ),
]
Rules = Annotated[
    list[str] | None,
    typer.Option(
        "--rule",
        metavar="PATTERN=FORMAT",
        help="Other format for the layers that match, NAME, NAME:key=value,... or float, and @INPUTS; first match "
        "wins; repeatable.",
        show_default=False,
    ),
]
Simulate = Annotated[
    bool,
    typer.Option(
        "--simulate",
        help="Round inputs that no kernel multiplies as they are stored, and multiply in floats; such recipes are "
        "refused otherwise.",
    ),
]
MaxMinutes = Annotated[
    float | None,
    typer.Option(
        metavar="MINUTES",
        help="Without --method: longest time of the method in the leaderboard (15); with --budget: of measuring "
        "sensitivities (twice that of quantizing).",
        show_default=False,
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Choose a format for every layer within this size: bits per weight of the blocks, such as 3.0bpw, "
        "the files of weights, such as 70MB, the memory of the running model, such as '8GB at 32k context', or "
        "the measured time of linear layers, such as '40ms prompts of 512' or '25 tokens/s'; "
        "verified on held-apart calibration windows.",
        show_default=False,
    ),
]
Methods = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="With --budget: methods to choose from, separated by commas (gptq,pvq,quip_sharp).",
        show_default=False,
    ),
]
Sensitivity = Annotated[
    str | None,
    typer.Option(
        metavar="PART",
        help="With --budget: how the effect of a format is measured: kl, noise, higgs, output_error, hutchinson, "
        "fisher or taylor (noise).",
        show_default=False,
    ),
]
Allocator = Annotated[
    str | None,
    typer.Option(
        metavar="PART",
        help="With --budget: how formats are chosen: integer_programme, dynamic_programming, greedy or "
        "gumbel_softmax (integer_programme).",
        show_default=False,
    ),
]
Corrections = Annotated[
    int | None,
    typer.Option(metavar="N", help="With --budget: measured corrections of the choice (1).", show_default=False),
]
SaveRecipe = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="With --budget: write the recipe to this .yaml file too, which --method reads; also with --dry-run.",
        show_default=False,
    ),
]
Calib = Annotated[
    str,
    typer.Option(
        metavar="SOURCE",
        envvar=VARIABLE,
        autocompletion=complete_calib,
        help="Calibration text: mix, another name of bitmill texts, self, a .txt or .jsonl file, hf:dataset.",
    ),
]
Measure = Annotated[
    int | None,
    typer.Option(
        metavar="W",
        help="Held-out windows to measure on while quantizing (4, or 1 of each domain); 0 for none.",
        show_default=False,
    ),
]
Estimate = Annotated[
    bool,
    typer.Option(
        "--estimate",
        help="Print only time, memory and size for this machine, from a trial on one block, and write nothing.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print sizes and bits, and write nothing.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")]


def quantize(
    model: Model,
    out: Out = None,
    method: MethodName = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    type: Type = None,
    settings: MethodSettings = None,
    format: FormatPart = None,
    solver: SolverPart = None,
    transform: Transforms = None,
    tuner: Tuners = None,
    sparse: Sparse = None,
    inputs: InputsPart = None,
    attention: AttentionParts = None,
    rules: Rules = None,
    simulate: Simulate = False,
    budget: Budget = None,
    methods: Methods = None,
    sensitivity: Sensitivity = None,
    allocator: Allocator = None,
    corrections: Corrections = None,
    save_recipe: SaveRecipe = None,
    propagate: Propagate = "quantized",
    max_minutes: MaxMinutes = None,
    calib: Calib = MIX,
    samples: Samples = 128,
    seqlen: Seqlen = 512,
    seed: Seed = 0,
    measure: Measure = None,
    head_bits: HeadBits = None,
    kv: Kv = None,
    kv_bits: KvBits = None,
    kv_set: KvSet = None,
    kv_samples: KvSamples = 16,
    kv_seqlen: KvSeqlen = None,
    device: Device = "cpu",
    estimate: Estimate = False,
    dry_run: DryRun = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    ray: Ray = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Quantize a model into a folder that transformers can load."""
    options = parse_method_options(bits, group_size, settings, type)
    parts: dict[str, Any] = {
        "format": format, "solver": solver, "transforms": transform, "tuners": tuner, "sparse": sparse,
        "inputs": inputs, "attention": attention, "rules": rules, "simulate": simulate or None,
    }  # fmt: skip
    request: dict[str, Any] = {
        "measure": measure, "device": device, "trust_remote_code": trust_remote_code, "propagate": propagate,
        "head_bits": parse_head_bits(head_bits), **kv_arguments(kv, kv_bits, kv_set, kv_samples, kv_seqlen),
    }  # fmt: skip
    planned: dict[str, Any] = {
        "budget": budget, "methods": None if methods is None else split_list(methods), "sensitivity": sensitivity,
        "allocator": allocator, "corrections": corrections, "save_recipe": save_recipe, "ray": ray,
    }  # fmt: skip
    with command_output(as_json) as output:
        output.progress.start("starting", 0)
        from bitmill import api
        from bitmill.checkpoint.work_folder import can_resume

        if budget is not None:
            _check_budget(method, parts, estimate)
            recipe, reason = None, ""
            request |= {"rules": parts["rules"] or [], "max_minutes": max_minutes}
        else:
            minutes = WITHIN_MINUTES if max_minutes is None else max_minutes
            recipe, reason = _choose_recipe(method, options, parts, minutes)
        request |= {name: value for name, value in planned.items() if value is not None}
        if recipe is None:
            request |= options  # which the workflow refuses
        request |= {"calib": api.CalibrationData(calib, samples, seqlen, seed), "progress": output.progress}
        if estimate:
            estimated = api.estimate(model, recipe or NONE, **request)
            found = {"model": model, **({"chosen": reason} if reason else {}), **estimated.to_dict()}
            output.result(found, lambda: [property_table([("model", model), *estimated.rows()])])
            return
        if out is None and not dry_run:
            out = (
                _default_folder(model, recipe, kv, kv_bits, request["kv_options"])
                if budget is None
                else _budget_folder(model, budget)
            )
        request |= {"out": out, "resume": resume, "overwrite": overwrite, "dry_run": dry_run}
        try:
            outcome = api.quantize(model, recipe or (NONE if budget is None else None), **request)
        except KeyboardInterrupt:
            if out is not None and can_resume(out):
                output.hint = "interrupted; continue with --resume"
            raise
        outcome.summary |= {"chosen": reason} if reason else {}
        data = {"model": model, **outcome.summary}
        output.result(data, lambda: [property_table(outcome.rows())])


def _check_budget(method: str | None, parts: dict[str, Any], estimate: bool) -> None:
    """Raise UsageError for options that --budget chooses itself, or cannot serve."""
    if method is not None:
        raise UsageError("--budget chooses among methods; name them with --methods instead of --method.")
    if estimate:
        raise UsageError("--estimate tries one recipe; with --budget use --dry-run, which prints the plan.")
    given = [name for name, part in parts.items() if part not in (None, []) and name != "rules"]
    if given:
        flag = "--" + given[0].removesuffix("s" if given[0] in ("transforms", "tuners") else "")
        raise UsageError(
            f"--budget chooses formats and solvers itself; leave out {flag}, or give layers a format with --rule."
        )


def _budget_folder(model: str, budget: str) -> Path:
    """Return the folder to write without -o, such as `smollm2-135m-budget-3.0bpw`."""
    from bitmill.workflows.budget.size import parse_budget
    from bitmill.workflows.names import model_name

    return Path(f"{model_name(model)}-budget-{parse_budget(budget).text.replace(' ', '-')}")


def _default_folder(
    model: str, recipe: Recipe | None, kv: str | None, kv_bits: int | None, kv_options: dict[str, Any]
) -> Path | None:
    """Return the folder to write without -o; None to calibrate keys and values of a finished folder in place."""
    from bitmill.checkpoint.reader import is_bitmill_folder
    from bitmill.config.paths import user_path
    from bitmill.kv.config import parse_kv_config
    from bitmill.workflows.names import default_name

    if recipe is None and is_bitmill_folder(user_path(model)):
        return None
    config = parse_kv_config(kv, kv_bits, kv_options)
    return Path(default_name(model, recipe, config.method() if config and config.name != NONE else None))


def _choose_recipe(
    method: str | None, options: dict[str, Any], parts: dict[str, Any], max_minutes: float
) -> tuple[Recipe | None, str]:
    """Return the recipe of a run.

    Args:
        method: --method; None for the best method of the leaderboard.
        options: options of the method.
        parts: parts that replace or extend those of the method, as for `compose`.
        max_minutes: --max-minutes.

    Returns:
        The recipe, None for the method `none`; and the reason for the choice where no method was named.

    Raises:
        UsageError: parts are given with the method `none`.
        RecipeError: the recipe cannot be built.
    """
    from bitmill.recipes.compose import compose, find_recipe, from_parts
    from bitmill.recipes.defaults import leading_recipe

    given = {name: part for name, part in parts.items() if part not in (None, [])}
    reason = ""
    if method == NONE:
        if given:
            raise UsageError("--method none leaves the weights as they are; leave out the parts of a recipe.")
        return None, reason
    if method:
        base = find_recipe(method, options)
    elif "format" in given and "solver" in given:
        base = from_parts(given.pop("format"), given.pop("solver"), options)
    else:
        base, reason = leading_recipe(options, max_minutes)
    return compose(base, **given), reason
