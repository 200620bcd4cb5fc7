"""Register the checkpoint format and bitmill's models with transformers, and packed layers with PEFT, on use.

Importing these libraries takes seconds. If one is already imported, all is registered at once; otherwise an import
hook registers it right after the library's module with the registry has been executed.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

# module with a registry -> module that registers something in it when it is imported
REGISTRATIONS = {
    "transformers.quantizers.auto": "bitmill.integrations.transformers_quantizer",
    "transformers.models.auto.configuration_auto": "bitmill.recurrent.register_configs",
    "transformers.models.auto.modeling_auto": "bitmill.recurrent.register_models",
    "peft.tuners.lora.model": "bitmill.integrations.peft_lora",
}


class _Loader(importlib.abc.Loader):
    """A loader that executes a module by its own loader, then imports the module that registers."""

    def __init__(self, loader: importlib.abc.Loader, registers: str) -> None:
        self._loader, self._registers = loader, registers

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)  # get_source and friends, for tracebacks and inspect

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        importlib.import_module(self._registers)


class _Finder(importlib.abc.MetaPathFinder):
    """A finder of the registries by the ordinary path search.

    It stays installed: callers may look up the spec without importing the module.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in REGISTRATIONS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, REGISTRATIONS[fullname])
        return spec


def register_with_transformers() -> None:
    """Make from_pretrained read bitmill's folders and models, and PEFT adapt them, in either order of imports."""
    present = [registers for registry, registers in REGISTRATIONS.items() if registry in sys.modules]
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())  # before others are imported, which import the other registries
    for registers in present:
        importlib.import_module(registers)
