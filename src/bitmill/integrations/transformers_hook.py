"""Register the checkpoint format with transformers if, and only if, transformers is used.

Importing transformers takes seconds. If it is already imported, the format is registered at once; otherwise an
import hook registers it right after the module with transformers' registry of quantizers has been executed.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"
QUANTIZER_MODULE = "bitmill.integrations.transformers_quantizer"  # registers itself when it is imported


class _Loader(importlib.abc.Loader):
    """A loader that executes a module by its own loader, then imports QUANTIZER_MODULE."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)  # get_source and friends, for tracebacks and inspect

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        importlib.import_module(QUANTIZER_MODULE)


class _Finder(importlib.abc.MetaPathFinder):
    """A finder of REGISTRY by the ordinary path search.

    It stays installed: callers may look up the spec without importing the module.
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
    """Make from_pretrained read bitmill's folders, in either order of the two imports."""
    if REGISTRY in sys.modules:
        importlib.import_module(QUANTIZER_MODULE)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
