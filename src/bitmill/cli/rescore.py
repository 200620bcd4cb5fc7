"""bitmill rescore."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bitmill.cli.complete import complete_demo_models
from bitmill.cli.options import AsJson, Device, TrustRemoteCode
from bitmill.cli.output import command_output, property_table
from bitmill.cli.quantize import Overwrite
from bitmill.report.text import format_number

Nbest = Annotated[
    Path,
    typer.Argument(
        metavar="NBEST",
        help="N-best lists: JSON lines, or Kaldi's text; with --paths lattices.",
        show_default=False,
    ),
]
Lm = Annotated[
    str,
    typer.Option(
        metavar="MODEL",
        help="Language model: a quantized folder, or any float model.",
        autocompletion=complete_demo_models,
        show_default=False,
    ),
]
Out = Annotated[Path, typer.Option("-o", "--out", help="JSON lines to write.", show_default=False)]
LmWeight = Annotated[
    float | None,
    typer.Option(
        metavar="W",
        help="Weight of the language model; tuned on the first utterances without it.",
        show_default=False,
    ),
]
InsertionPenalty = Annotated[
    float,
    typer.Option(metavar="P", help="Added to the score for every word; above 0 it favours longer texts."),
]
References = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Lines: id, and the words that were said.", show_default=False)
]
Costs = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Costs of the hypotheses in Kaldi's text (ac_cost).", show_default=False),
]
Paths = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="NBEST is a file or folder of lattices (HTK, OpenFst, Kaldi): rescore the N best paths of each.",
        show_default=False,
    ),
]
DevShare = Annotated[
    float, typer.Option(metavar="SHARE", help="Share of the utterances, the first ones, that tune the weight.")
]
ScoreEnd = Annotated[bool, typer.Option("--score-end", help="Count the end-of-text token after each hypothesis.")]
BatchSize = Annotated[int, typer.Option(metavar="N", help="Hypotheses that run together.")]


def rescore(
    nbest: Nbest,
    lm: Lm,
    out: Out,
    lm_weight: LmWeight = None,
    insertion_penalty: InsertionPenalty = 0.0,
    references: References = None,
    costs: Costs = None,
    paths: Paths = None,
    dev_share: DevShare = 0.3,
    score_end: ScoreEnd = False,
    batch_size: BatchSize = 16,
    overwrite: Overwrite = False,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Choose among the hypotheses of a speech recognizer with a language model, and count word errors."""
    with command_output(as_json) as output:
        output.progress.start("starting", 0)
        from bitmill.workflows.rescore import rescore

        result = rescore(
            nbest,
            lm,
            out=out,
            lm_weight=lm_weight,
            insertion_penalty=insertion_penalty,
            references=references,
            costs=costs,
            paths=paths,
            dev_share=dev_share,
            score_end=score_end,
            batch_size=batch_size,
            overwrite=overwrite,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=output.progress,
        )
        result = {"lm": lm, **result}
        output.result(result, lambda: [property_table(_rows(result))])


def _rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    tuned = f", tuned on the first {result['tuned_on']} utterances" if result["tuned_on"] else ""
    rows = [
        ("language model", str(result["lm"])),
        ("n-best lists", f"{result['utterances']} utterances, {result['hypotheses']} hypotheses"),
        ("weight", f"{format_number(result['lm_weight'])}{tuned}"),
    ]
    if errors := result.get("word_errors"):
        low, high = errors["interval"]
        less, more = errors["difference_interval"]
        rows += [
            ("word errors", f"{errors['rescored']:.1%} of {errors['words']} words ({low:.1%} to {high:.1%})"),
            ("first hypotheses", f"{errors['first']:.1%}"),
            ("difference", f"{less:+.1%} to {more:+.1%}, p = {errors['p']:.3f} (matched pairs)"),
            ("best hypotheses", f"{errors['oracle']:.1%}"),
        ]
    return [*rows, ("written", str(result["out"])), ("time", f"{format_number(result['time_s'])} s")]
