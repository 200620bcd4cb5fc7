"""bitmill train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bitmill.cli.complete import complete_calib, complete_demo_models
from bitmill.cli.options import AsJson, Device, QuantizedFolder, Seed, Seqlen, TrustRemoteCode
from bitmill.cli.output import command_output, property_table
from bitmill.cli.quantize import Overwrite, Resume
from bitmill.config.texts import MIX, VARIABLE

Out = Annotated[
    Path | None,
    typer.Option("-o", "--out", help="Folder to write; without it DIR-trained next to DIR.", show_default=False),
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
    folder: QuantizedFolder,
    out: Out = None,
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
    with command_output(as_json) as output:
        output.progress.start("starting", 0)
        from bitmill import api
        from bitmill.checkpoint.work_folder import can_resume

        place = _default_folder(folder) if out is None else out
        request: dict[str, Any] = {
            "teacher": teacher, "loss": loss, "learn": learn, "epochs": epochs, "rate": rate, "tokens": tokens,
            "held_apart": held_apart, "max_minutes": max_minutes, "resume": resume, "overwrite": overwrite,
            "device": device, "trust_remote_code": trust_remote_code, "progress": output.progress,
        }  # fmt: skip
        try:
            outcome = api.train(
                folder, out=place, calib=api.CalibrationData(calib, samples, seqlen, seed), **request
            )
        except KeyboardInterrupt:
            if can_resume(place):
                output.hint = "interrupted; continue with --resume"
            raise
        output.result(outcome.summary, lambda: [property_table(outcome.rows())])


def _default_folder(folder: Path) -> Path:
    """Return the folder to write without -o."""
    from bitmill.config.paths import user_path

    resolved = user_path(folder).resolve()
    return resolved.with_name(f"{resolved.name}-trained")
