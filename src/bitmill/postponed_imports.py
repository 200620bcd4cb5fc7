"""Imports that transformers makes for features that a command does not use: half of the time to start.

torch._dynamo, torch's compiler, is imported for one class and a few decorators. Here the package stands in
`sys.modules` unexecuted: the decorators have stand-ins, and any other attribute executes it.
torch.distributed.tensor, scipy and sklearn serve models that are split among processes, losses of object detection
and assisted generation: transformers leaves them out where it finds them missing.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import os
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
# A module of the compiler that needs no other of them; it has the class that transformers imports.
_INDEPENDENT = f"{COMPILER}._trace_wrapped_higher_order_op"
_AVAILABILITY = "transformers.utils.import_utils"  # where transformers asks for optional packages
_LEFT_OUT = ("is_torch_distributed_available", "is_scipy_available", "is_sklearn_available")
_MARKS = ("allow_in_graph", "assume_constant_result")
_executing = threading.RLock()


class PostponedModule(ModuleType):
    """torch's compiler, which executes at its first attribute without a stand-in.

    Attributes:
        postponed: Executes the module; None from then on.
        marked: Decorators by name and the functions that they were given, repeated once the module is executed.
    """

    postponed: Callable[[ModuleType], None] | None
    marked: list[tuple[str, Callable[..., Any]]]

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__") or name == "__all__":
            with _executing:  # another thread may be executing the module
                self.execute()
                if name in vars(self):
                    return vars(self)[name]
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def execute(self) -> None:
        """Execute the module, and repeat the decorators."""
        with _executing:
            run = vars(self).get("postponed")
            if run is None:
                return
            self.postponed = None
            stood_in = {name: vars(self).pop(name) for name in ("disable", *_MARKS)}
            try:
                run(self)
            except BaseException:
                vars(self).update(stood_in, postponed=run)
                raise
            for name, function in self.marked:
                getattr(self, name)(function)


def _mark(compiler: PostponedModule, name: str, fn: Any) -> Any:
    compiler.marked.append((name, fn))
    return fn


def _disable(compiler: PostponedModule, fn: Any = None, recursive: bool = True, **options: Any) -> Any:
    """Return a function that nothing compiles: unchanged while there is no compiler, wrapped by it later."""
    if fn is None:
        return functools.partial(_disable, compiler, recursive=recursive, **options)
    if isinstance(fn, type):
        compiler.execute()
        return compiler.disable(fn, recursive, **options)

    @functools.cache
    def wrapped() -> Any:
        return compiler.disable(fn, recursive, **options)

    @functools.wraps(fn)
    def disabled(*args: Any, **kwargs: Any) -> Any:
        return (fn if compiler.postponed else wrapped())(*args, **kwargs)

    return disabled


class _Loader(importlib.abc.Loader):
    """A loader that wraps a module's own."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # get_source and friends, for tracebacks and inspect


class _CompilerLoader(_Loader):
    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return PostponedModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        assert isinstance(module, PostponedModule)
        module.marked, module.postponed = [], self._loader.exec_module
        marks = {name: functools.partial(_mark, module, name) for name in _MARKS}
        vars(module).update(marks, disable=functools.partial(_disable, module))


class _AvailabilityLoader(_Loader):
    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        vars(module).update({name: _not_available for name in _LEFT_OUT if hasattr(module, name)})


def _not_available() -> bool:
    return False


_LOADERS = {COMPILER: _CompilerLoader, _AVAILABILITY: _AvailabilityLoader}


class _Finder(importlib.abc.MetaPathFinder):
    """A finder of the modules of `_LOADERS` by the ordinary path search."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname in _LOADERS:
            spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _LOADERS[fullname](spec.loader)
            return spec
        if fullname.startswith(f"{COMPILER}.") and fullname != _INDEPENDENT:
            package = sys.modules[COMPILER]
            if isinstance(package, PostponedModule):
                package.execute()  # modules of the package import one another in its order
        return None


def postpone_imports() -> None:
    """Let later imports of transformers leave out what the module's text names; for a process of bitmill's own.

    Modules that are imported already stay. A process that torchrun has started keeps torch.distributed.
    """
    if "WORLD_SIZE" not in os.environ and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
