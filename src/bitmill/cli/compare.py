"""bitmill compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitmill.cli.complete import complete_calib, complete_methods, complete_text
from bitmill.cli.options import (
    AsJson,
    Device,
    HeadBits,
    Model,
    Propagate,
    Ray,
    Samples,
    Seed,
    Seqlen,
    TrustRemoteCode,
    parse_head_bits,
    split_list,
)
from bitmill.cli.output import command_output, data_table
from bitmill.cli.tasks import Limit, RunCode
from bitmill.config.texts import MIX, VARIABLE
from bitmill.errors import BitmillError, UsageError

if TYPE_CHECKING:
    from bitmill.report.pictures import PictureResults
    from bitmill.report.results import Results

Out = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--out",
        help="Folder of the comparison, continued if it exists; without it MODEL-comparison in this folder.",
        show_default=False,
    ),
]
Methods = Annotated[
    str,
    typer.Option(
        metavar="A,B", help="Named methods, or all.", autocompletion=complete_methods, show_default=False
    ),
]
Bits = Annotated[str, typer.Option(metavar="B,C", help="Bits for each of the methods.", show_default=False)]
Recipes = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE",
        help="Recipe .yaml or a user recipe, one variant each; repeatable.",
        show_default=False,
    ),
]
Budgets = Annotated[
    str,
    typer.Option(
        metavar="A,B",
        help="Budgets, such as 2.5bpw,3bpw or 70MB, one variant each, see quantize --budget.",
        show_default=False,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="METHOD.KEY=VALUE", help="Option of one method; repeatable.", show_default=False
    ),
]
Calib = Annotated[
    str,
    typer.Option(
        metavar="SOURCE",
        envvar=VARIABLE,
        autocompletion=complete_calib,
        help="Text: one part calibrates, another one measures.",
    ),
]
Text = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        autocompletion=complete_text,
        help="Text to measure on, such as suite; the held-out part of the calibration text without it.",
        show_default=False,
    ),
]
Windows = Annotated[
    int | None,
    typer.Option(
        metavar="W",
        help="Held-out windows to measure on, of each domain for suite and mix (40, or 8 of each domain).",
        show_default=False,
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Prompts to answer, one per line; three built-in ones otherwise.",
                 show_default=False),
]  # fmt: skip
Tasks = Annotated[
    str | None,
    typer.Option(
        metavar="T,T,...",
        help="Benchmark tasks to measure every variant on as well, such as arc_easy,lambada.",
        show_default=False,
    ),
]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", help="Maximum number of tokens of an answer.")]
KeepModels = Annotated[bool, typer.Option("--keep-models", help="Keep the quantized folders.")]


def compare(
    model: Model,
    out: Out = None,
    methods: Methods = "",
    bits: Bits = "",
    recipes: Recipes = None,
    budgets: Budgets = "",
    settings: Settings = None,
    calib: Calib = MIX,
    samples: Samples = 128,
    seqlen: Seqlen = 512,
    seed: Seed = 0,
    text: Text = None,
    windows: Windows = None,
    prompts: Prompts = None,
    max_new_tokens: MaxNewTokens = 48,
    tasks: Tasks = None,
    limit: Limit = 200,
    run_code: RunCode = False,
    propagate: Propagate = "quantized",
    head_bits: HeadBits = None,
    device: Device = "cpu",
    keep_models: KeepModels = False,
    ray: Ray = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Quantize a model with several methods, measure each under equal conditions, and write a page about it."""
    request: dict[str, Any] = {
        "text": text, "windows": windows, "max_new_tokens": max_new_tokens, "propagate": propagate,
        "head_bits": parse_head_bits(head_bits),
        "tasks": split_list(tasks or ""), "limit": limit or None, "run_code": run_code,
        "device": device, "keep_models": keep_models, "ray": ray, "trust_remote_code": trust_remote_code,
        "budgets": split_list(budgets),
        "recipes": [path for given in recipes or [] for path in split_list(given)],
        "options": parse_options_by_method(settings or []),
        **({} if prompts is None else {"prompts": read_prompts(prompts)}),
    }  # fmt: skip
    with command_output(as_json, "interrupted; run the command again to continue") as output:
        output.progress.start("starting", 0)
        from bitmill.data.windows import CalibrationData
        from bitmill.recipes.method import METHODS
        from bitmill.report.comparison import results_table
        from bitmill.report.pictures import PictureResults, picture_rows
        from bitmill.workflows.comparison.compare import compare
        from bitmill.workflows.names import model_name

        if out is None:
            out = Path(f"{model_name(model)}-comparison")
        named = METHODS.names() if methods.strip() == "all" else split_list(methods)
        calibration = CalibrationData(calib, samples, seqlen, seed)
        results = compare(
            model, named, _parse_bits(bits), out=out, calib=calibration, progress=output.progress, **request
        )
        if isinstance(results, PictureResults):
            data = {"out": str(out), **results.model_dump(exclude={"examples"})}
            titles, rows = picture_rows(results)
            output.result(data, lambda: [data_table(titles, rows, ("variant",)), *_status_lines(results, out)])
        else:
            data = {"out": str(out), **results.model_dump(exclude={"variants": {"__all__": {"layers"}}})}
            tables = [results_table(results), *_task_table(results)]
            output.result(data, lambda: [*tables, *_status_lines(results, out)])
        _raise_failures(results)


def _task_table(results: Results) -> list[Any]:
    """Return the figures of tasks as a table, and what the sandbox of their programs did not protect."""
    from bitmill.report.comparison import label, results_by_task

    titles, rows = results_by_task(results)
    if not titles:
        return []
    named = [[label(variant) if variant else "float", *cells] for variant, cells in rows]
    settings = results.settings.tasks
    unprotected = settings.unprotected if settings else []
    gaps = [f"programs could reach {' and '.join(unprotected)}"] if unprotected else []
    return [data_table(["model", *titles], named, left=("model",)), *gaps]


def _raise_failures(results: Results | PictureResults) -> None:
    failed = [variant for variant in results.variants if variant.status == "failed"]
    if failed:
        raise BitmillError(
            f"{len(failed)} of {len(results.variants)} variants failed, the first one {failed[0].name!r}; "
            "run the command again to retry them."
        )


def parse_options_by_method(settings: list[str]) -> dict[str, dict[str, Any]]:
    """Return options by method, from METHOD.KEY=VALUE.

    Raises:
        UsageError: a setting has another form, or a key is given twice.
    """
    options: dict[str, dict[str, Any]] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        method, dot, key = name.strip().rpartition(".")
        key = key.replace("-", "_")
        if not (equals and dot and method and key.isidentifier()):
            raise UsageError(
                f"--set expects METHOD.KEY=VALUE here, not {setting!r}; for example --set gptq.damp=0.05."
            )
        of_method = options.setdefault(method, {})
        if key in of_method:
            raise UsageError(f"--set gives {key!r} of {method!r} twice; give it once.")
        of_method[key] = value.strip()
    return options


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a text file, one per non-empty line.

    Raises:
        UsageError: the file cannot be read or has no prompt.
    """
    from bitmill.config.documents import read_document
    from bitmill.config.paths import user_path

    text = read_document(user_path(path), "file of prompts", UsageError)
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UsageError(f"{path} has no prompts; write one per line.")
    return prompts


def _parse_bits(text: str) -> list[int]:
    from bitmill.config.options import is_count

    items = split_list(text)
    if wrong := next((item for item in items if not is_count(item)), None):
        raise UsageError(f"--bits contains {wrong!r}; give whole numbers such as 2,3,4.")
    return [int(item) for item in items]


def _status_lines(results: Results | PictureResults, out: Path) -> list[str]:
    lines = [
        f"{variant.name}: {variant.status.replace('_', ' ')}: {variant.reason or ''}"
        for variant in results.variants
        if variant.reason
    ]
    return [*lines, f"page  {out / 'report.html'}", f"data  {out / 'results.json'}"]
