"""The entry point `bitmill`: the commands, and how every failure reaches the user."""

from __future__ import annotations

import itertools
import os
import sys
import traceback
import warnings
from typing import Annotated

import typer

from bitmill.cli import bench, catalog, compare, evaluate, folder, generate, plan, quantize, study
from bitmill.cli.output import Interrupted, in_one_line
from bitmill.errors import BitmillError
from bitmill.version import __version__

UNEXPECTED = 70  # EX_SOFTWARE
INTERRUPTED = 130

app = typer.Typer(
    name="bitmill",
    help="Quantize language models with published methods, measure them, and run them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("quantize")(quantize.quantize)
app.command("eval")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("study")(study.study)
app.command("plan")(plan.plan)
app.command("generate")(generate.generate)
app.command("chat")(generate.chat)
app.command("inspect")(folder.inspect)
app.command("verify")(folder.verify)
app.command("methods")(catalog.methods)
app.command("recipes")(catalog.recipes)
app.command("models")(catalog.models)
app.add_typer(bench.app, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bitmill {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main(args: list[str] | None = None) -> int:
    """Run one command; returns the exit status. Whatever fails, fails in one line on stderr."""
    _quiet_libraries()
    with warnings.catch_warnings():
        if not _debugging():
            warnings.simplefilter("ignore")
        return _run(args)


def _run(args: list[str] | None) -> int:
    try:
        status = app(args=args, prog_name="bitmill", standalone_mode=False) or 0
        sys.stdout.flush()
        return status
    except Interrupted as interrupt:
        print(interrupt, file=sys.stderr)
        return INTERRUPTED
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except BitmillError as error:
        return _complain(str(error), error.exit_code)
    except Exception as error:
        # typer carries click inside since 0.29, so its errors are told by what they can do
        if hasattr(error, "format_message"):
            if type(error).__name__ == "NoArgsIsHelpError":  # the help is printed already
                return 2
            return _complain(f"{error.format_message().rstrip('.')}{_found(error, args)}; see bitmill --help.", 2)
        if _debugging():
            traceback.print_exc()
        return _complain(_unexpected(error), UNEXPECTED)


def _found(error: Exception, args: list[str] | None) -> str:
    """The value that was given for the option an error is about, which its message may leave out."""
    names = getattr(getattr(error, "param", None), "opts", [])
    words = sys.argv[1:] if args is None else args
    found = ""
    for name, value in itertools.pairwise([*words, ""]):  # the last one counts
        if name.partition("=")[0] in names:
            found = f" (found {value if name in names else name.partition('=')[2]!r})"
    return found


def _unexpected(error: Exception) -> str:
    said = in_one_line(str(error))
    kind = f"{type(error).__name__} ({said})" if said else type(error).__name__
    return f"Unexpected {kind}: run with BITMILL_DEBUG=1 for the traceback; please report."


def _complain(sentence: str, status: int) -> int:
    print(f"error: {in_one_line(sentence, limit=2000)}", file=sys.stderr)
    return status


def _debugging() -> bool:
    return os.environ.get("BITMILL_DEBUG", "") not in ("", "0")


def _quiet_libraries() -> None:
    """transformers reads these when it is imported; the user's own settings win."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not _debugging():
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if "transformers" in sys.modules:  # called from a program that has it already
        from transformers.utils import logging

        logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
