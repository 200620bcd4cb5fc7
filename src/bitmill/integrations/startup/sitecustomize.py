"""Register bitmill's format in a Python process that `bitmill exec` started, or a child of it.

Python imports the first `sitecustomize` on its path when it starts. This one imports the one that it hides, then
bitmill, which registers its format once transformers is imported.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import sys


def _import_hidden() -> None:
    """Run the `sitecustomize` of the environment, if it has one."""
    here = os.path.realpath(os.path.dirname(__file__))
    path = [entry for entry in sys.path if os.path.realpath(entry or ".") != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", path)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


_import_hidden()
try:
    importlib.import_module("bitmill")
except ImportError:
    print(
        f"bitmill exec: {sys.executable} has no bitmill, so it cannot open bitmill's folders; install it there, "
        "or run the program of this environment.",
        file=sys.stderr,
    )
