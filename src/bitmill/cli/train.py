"""bitmill train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bitmill.cli.complete import complete_calib, complete_demo_models, complete_method
from bitmill.cli.options import (
    AsJson,
    Device,
    MethodSettings,
    Seed,
    Seqlen,
    TrustRemoteCode,
    parse_method_options,
)
from bitmill.cli.output import command_output, property_table
from bitmill.cli.quantize import Bits, GroupSize, Overwrite, Resume
from bitmill.config.texts import MIX, VARIABLE

Folder = Annotated[
    str,
    typer.Argument(
        metavar="DIR",
        help="Folder written by bitmill quantize; with --method a float model.",
        autocompletion=complete_demo_models,
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "-o", "--out", help="Folder to write; without it DIR-trained next to DIR, or here.", show_default=False
    ),
]
MethodName = Annotated[
    str | None,
    typer.Option(
        help="Quantize a float model by this method or recipe first, on the text to train on; kept as OUT-start.",
        autocompletion=complete_method,
        show_default=False,
    ),
]
Teacher = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Float model to learn from; without it the one that the folder was made from.",
        autocompletion=complete_demo_models,
        show_default=False,
    ),
]
Loss = Annotated[
    str,
    typer.Option(
        metavar="kl|next-token",
        help="Divergence from the float model's predictions, or cross entropy of the text without a teacher.",
    ),
]
Learn = Annotated[
    str,
    typer.Option(
        metavar="all|scales|norms",
        help="Train the numbers that formats store (scales, codebooks), norms and biases, or both.",
    ),
]
Epochs = Annotated[int, typer.Option(metavar="N", help="Passes over the windows.")]
Rate = Annotated[
    float, typer.Option(metavar="R", help="Learning rate, in units of the mean size of each row of parameters.")
]
Tokens = Annotated[int, typer.Option(metavar="T", help="Tokens of a step, in whole windows.")]
HeldApart = Annotated[
    int, typer.Option(metavar="W", help="Windows kept out of training, which choose the state that is written.")
]
MaxMinutes = Annotated[
    float | None, typer.Option(metavar="MINUTES", help="End training after this time.", show_default=False)
]
Calib = Annotated[
    str,
    typer.Option(
        metavar="SOURCE",
        envvar=VARIABLE,
        autocompletion=complete_calib,
        help="Text to train on: mix, another name of bitmill texts, a .txt or .jsonl file, hf:dataset, "
        "or self: the float model writes it.",
    ),
]
Samples = Annotated[int, typer.Option(metavar="N", help="Windows, those that are held apart included.")]


def train(
    folder: Folder,
    out: Out = None,
    method: MethodName = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    settings: MethodSettings = None,
    teacher: Teacher = None,
    loss: Loss = "kl",
    learn: Learn = "all",
    epochs: Epochs = 1,
    rate: Rate = 1e-3,
    tokens: Tokens = 512,
    held_apart: HeldApart = 8,
    max_minutes: MaxMinutes = None,
    calib: Calib = MIX,
    samples: Samples = 128,
    seqlen: Seqlen = 512,
    seed: Seed = 0,
    device: Device = "cpu",
    resume: Resume = False,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Train scales, codebooks and norms of a quantized folder to the float model's predictions; codes stay."""
    options = parse_method_options(bits, group_size, settings)
    with command_output(as_json) as output:
        output.progress.start("starting", 0)
        from bitmill import api
        from bitmill.checkpoint.work_folder import can_resume
        from bitmill.workflows.training_start import start_folder

        place = _default_folder(folder, method, options) if out is None else out
        request: dict[str, Any] = {
            "method": method, "options": options,
            "teacher": teacher, "loss": loss, "learn": learn, "epochs": epochs, "rate": rate, "tokens": tokens,
            "held_apart": held_apart, "max_minutes": max_minutes, "resume": resume, "overwrite": overwrite,
            "device": device, "trust_remote_code": trust_remote_code, "progress": output.progress,
        }  # fmt: skip
        try:
            outcome = api.train(
                folder, out=place, calib=api.CalibrationData(calib, samples, seqlen, seed), **request
            )
        except KeyboardInterrupt:
            if can_resume(place) or can_resume(start_folder(place)):
                output.hint = "interrupted; continue with --resume"
            raise
        output.result(outcome.summary, lambda: [property_table(outcome.rows())])


def _default_folder(folder: str, method: str | None, options: dict[str, Any]) -> Path:
    """Return the folder to write without -o."""
    from bitmill.config.paths import user_path
    from bitmill.recipes.compose import find_recipe
    from bitmill.workflows.names import default_name

    if method is not None:
        return Path(f"{default_name(folder, find_recipe(method, options), None)}-trained")
    resolved = user_path(folder).resolve()
    return resolved.with_name(f"{resolved.name}-trained")
