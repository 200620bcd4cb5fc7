"""How much a command prints: the result alone, the usual progress, or a debug log."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextvars import ContextVar

from bitmill.errors import UsageError

LOGGERS = ("bitmill", "transformers", "huggingface_hub")
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_quiet: ContextVar[bool] = ContextVar("quiet", default=False)


def is_quiet() -> bool:
    """Return True while only the result and errors are printed."""
    return _quiet.get()


@contextlib.contextmanager
def verbosity(verbose: bool, quiet: bool) -> Iterator[None]:
    """Print more or less while a command runs.

    Args:
        verbose: print the debug log of bitmill, transformers and huggingface_hub, and warnings, on stderr.
        quiet: print neither progress nor notes.

    Raises:
        UsageError: both are given.
    """
    if verbose and quiet:
        raise UsageError("--verbose and --quiet contradict each other; give one of them.")
    token = _quiet.set(quiet)
    try:
        with _debug_log() if verbose else contextlib.nullcontext():
            yield
    finally:
        _quiet.reset(token)


@contextlib.contextmanager
def _debug_log() -> Iterator[None]:
    warnings.simplefilter("default")
    if os.environ.get("TRANSFORMERS_VERBOSITY") == "error":  # set by `main`; read when transformers is imported
        os.environ["TRANSFORMERS_VERBOSITY"] = "debug"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_FORMAT))
    loggers = {logger: logger.level for logger in map(logging.getLogger, LOGGERS)}
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger, level in loggers.items():
            logger.removeHandler(handler)
            logger.setLevel(level)
