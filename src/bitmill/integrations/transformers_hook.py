"""Teach transformers the checkpoint format when, and only when, transformers is used.

Importing transformers takes seconds. If it is there already, the format is registered at once; otherwise a
finder waits for the import of the module that keeps the registry, and registers right after it has run.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"
TEACHER = "bitmill.integrations.transformers_quantizer"  # registers itself when it is imported


class _Loader(importlib.abc.Loader):
    """Runs a module as its own loader would, then imports TEACHER."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)  # get_source and friends, for tracebacks and inspect

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        importlib.import_module(TEACHER)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds REGISTRY by way of the ordinary path search.

    It never leaves: who asks for the spec may only want to know whether the module is there.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def register_with_transformers() -> None:
    """Make from_pretrained read bitmill's folders, whichever of the two is imported first."""
    if REGISTRY in sys.modules:
        importlib.import_module(TEACHER)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
