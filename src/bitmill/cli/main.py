"""The entry point `bitmill`: registers the commands and reports every failure in one line."""

from __future__ import annotations

import io
import os
import sys
import warnings
from typing import Annotated

import typer

from bitmill.cli import (
    bench,
    catalog,
    chat,
    compare,
    doctor,
    evaluate,
    execute,
    export,
    folder,
    generate,
    import_checkpoint,
    lint,
    plan,
    quantize,
    rescore,
    serve,
    sweep,
    texts,
    train,
)
from bitmill.cli.app import App
from bitmill.cli.failure import debugging, report_failure
from bitmill.cli.help import MEASURE
from bitmill.postponed_imports import postpone_imports
from bitmill.version import __version__

RENAMED_COMMANDS = {"study": "sweep"}  # old names, accepted until the next release
RENAMED_OPTIONS = {"quantize": {"--within": "--max-minutes"}}  # by command

app = App(
    name="bitmill",
    help="Quantize language models with published methods, measure them, and run them.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("quantize")(quantize.quantize)
app.command("train")(train.train)
app.command("eval")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("sweep")(sweep.sweep)
app.command("rescore")(rescore.rescore)
app.command("plan")(plan.plan)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.command("export")(export.export)
app.command("import")(import_checkpoint.import_checkpoint)
app.command("lint")(lint.lint)
app.command("exec")(execute.execute)
app.command("inspect")(folder.inspect)
app.command("verify")(folder.verify)
app.command("methods")(catalog.methods)
app.command("recipes")(catalog.recipes)
app.command("models")(catalog.models)
app.command("texts")(texts.texts)
app.command("doctor")(doctor.doctor)
app.add_typer(bench.app, name="bench", rich_help_panel=MEASURE)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"bitmill {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main(args: list[str] | None = None) -> int:
    """Run one command and return its exit status.

    A failure is one line on stderr and, with --json, one JSON object on stdout.

    Args:
        args: the command's words; those of the process (sys.argv) when left out.
    """
    if args is None:
        postpone_imports()
    _quiet_libraries()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for names that its encoding does not have
    with warnings.catch_warnings():
        if not debugging():
            warnings.simplefilter("ignore")
        return _run(replace_old_names(sys.argv[1:] if args is None else args))


def _run(args: list[str]) -> int:
    try:
        status = app(args=args, prog_name="bitmill", standalone_mode=False) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of our output has exited, as `head` does
        return _without_reader()
    except (Exception, KeyboardInterrupt) as error:
        try:
            return report_failure(error, args)
        except BrokenPipeError:
            return _without_reader()


def _without_reader() -> int:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 0


def replace_old_names(args: list[str]) -> list[str]:
    """Return the arguments with renamed commands and options replaced; each prints a deprecation note."""
    if not args:
        return args
    command = RENAMED_COMMANDS.get(args[0], args[0])
    if command != args[0]:
        _note_renamed(args[0], command)
    options = RENAMED_OPTIONS.get(command, {})
    replaced = [command]
    for word in args[1:]:
        name, equals, value = word.partition("=")
        if name in options:
            _note_renamed(name, options[name])
            word = options[name] + equals + value
        replaced.append(word)
    return replaced


def _note_renamed(old: str, new: str) -> None:
    print(f"note: {old} is deprecated and will be removed in the next release; use {new}.", file=sys.stderr)


def _quiet_libraries() -> None:
    """Set environment variables that transformers reads on import; the user's own settings win."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not debugging():
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if "transformers" in sys.modules:  # imported before by the calling program
        from transformers.utils import logging

        logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
