"""bitmill: quantize neural language models with published methods, to a bit budget, measured, and run them.

Importing it teaches transformers the checkpoint format, so that `from_pretrained` reads bitmill's folders.
torch and transformers themselves are imported on first use, which keeps the command line quick.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from bitmill.errors import BitmillError
from bitmill.hook import teach_transformers
from bitmill.version import __version__

if TYPE_CHECKING:
    from bitmill.api import Calibration, Outcome, evaluate, load, load_tokenizer, quantize
    from bitmill.quantized import Quantized
    from bitmill.recipe import Recipe

__all__ = [
    "BitmillError",
    "Calibration",
    "Outcome",
    "Quantized",
    "Recipe",
    "__version__",
    "evaluate",
    "load",
    "load_tokenizer",
    "quantize",
]

_HOMES = {
    "Calibration": "bitmill.api",
    "Outcome": "bitmill.api",
    "load": "bitmill.api",
    "load_tokenizer": "bitmill.api",
    "quantize": "bitmill.api",
    "Quantized": "bitmill.quantized",
    "Recipe": "bitmill.recipe",
}


class _Package(ModuleType):
    """This module, with names that are looked up on first use."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'bitmill' has no attribute {name!r}")
        value = getattr(importlib.import_module(_HOMES[name]), name)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_HOMES, "evaluate"})

    @property
    def evaluate(self) -> Any:
        """The function, not the package of that name: importing the package would otherwise hide it."""
        return importlib.import_module("bitmill.api").evaluate

    @evaluate.setter
    def evaluate(self, value: Any) -> None:
        """The import system hangs the package here; it stays reachable by `from bitmill.evaluate import ...`."""


sys.modules[__name__].__class__ = _Package
teach_transformers()
