"""The entry point `bitmill`: registers the commands and reports every failure in one line."""

from __future__ import annotations

import io
import itertools
import os
import sys
import traceback
import warnings
from typing import Annotated

import typer

from bitmill.cli import bench, catalog, compare, evaluate, folder, generate, plan, quantize, sweep
from bitmill.cli.output import Interrupted, one_line
from bitmill.errors import BitmillError, is_out_of_memory
from bitmill.version import __version__

_NO_MEMORY = "The memory of this machine does not suffice; use a smaller model, shorter windows or fewer bits."
UNEXPECTED = 70  # EX_SOFTWARE
INTERRUPTED = 130
RENAMED_COMMANDS = {"study": "sweep"}  # old names, accepted until the next release
RENAMED_OPTIONS = {"quantize": {"--within": "--max-minutes"}}  # by command

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
app.command("sweep")(sweep.sweep)
app.command("plan")(plan.plan)
app.command("generate")(generate.generate)
app.command("chat")(generate.chat)
app.command("inspect")(folder.inspect)
app.command("verify")(folder.verify)
app.command("methods")(catalog.methods)
app.command("recipes")(catalog.recipes)
app.command("models")(catalog.models)
app.add_typer(bench.app, name="bench")


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
    """Run one command and return its exit status; every failure is one line on stderr.

    Args:
        args: the command's words; those of the process (sys.argv) when left out.
    """
    _quiet_libraries()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for names that its encoding does not have
    with warnings.catch_warnings():
        if not _debugging():
            warnings.simplefilter("ignore")
        return _run(replace_old_names(sys.argv[1:] if args is None else args))


def _run(args: list[str]) -> int:
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
    except BrokenPipeError:  # the reader of our output has exited, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except BitmillError as error:
        return _print_error(str(error), error.exit_code)
    except OSError as error:
        return _print_error(_describe_os_error(error), BitmillError.exit_code)
    except Exception as error:
        # typer contains its own click since 0.29, so its errors are recognized by their attributes
        if hasattr(error, "format_message"):
            if type(error).__name__ == "NoArgsIsHelpError":  # the help is printed already
                return 2
            message = f"{error.format_message().rstrip('.')}{_given_value(error, args)}"
            return _print_error(f"{message}; see bitmill --help.", 2)
        if is_out_of_memory(error):
            return _print_error(_NO_MEMORY, BitmillError.exit_code)
        if _debugging():
            traceback.print_exc()
        return _print_error(_describe_unexpected(error), UNEXPECTED)


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


def _given_value(error: Exception, args: list[str]) -> str:
    """Return the value given for the option that an error is about, which its message may leave out."""
    names = getattr(getattr(error, "param", None), "opts", [])
    found = ""
    for name, value in itertools.pairwise([*args, ""]):  # the last one counts
        if name.partition("=")[0] in names:
            found = f" (found {value if name in names else name.partition('=')[2]!r})"
    return found


def _describe_os_error(error: OSError) -> str:
    """Return one sentence about a file or device that failed where no sentence of its own was foreseen."""
    reason = error.strerror or one_line(str(error)) or type(error).__name__
    named = f"{error.filename}: " if error.filename else ""
    return f"{named}{reason}; check the path, its permissions and the disk."


def _describe_unexpected(error: Exception) -> str:
    message = one_line(str(error))
    kind = f"{type(error).__name__} ({message})" if message else type(error).__name__
    return f"Unexpected {kind}: run with BITMILL_DEBUG=1 for the traceback; please report."


def _print_error(sentence: str, status: int) -> int:
    print(f"error: {one_line(sentence, limit=2000)}", file=sys.stderr)
    return status


def _debugging() -> bool:
    return os.environ.get("BITMILL_DEBUG", "") not in ("", "0")


def _quiet_libraries() -> None:
    """Set environment variables that transformers reads on import; the user's own settings win."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not _debugging():
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if "transformers" in sys.modules:  # imported before by the calling program
        from transformers.utils import logging

        logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
