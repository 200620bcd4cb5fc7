"""bitmill: quantize neural language models with published methods, to a bit budget, measured, and run them.

The import registers the checkpoint format with transformers, so that `from_pretrained` reads bitmill's folders,
and lets waiting threads of OpenMP sleep soon (`bitmill.openmp`).
torch and transformers themselves are imported on first use, which keeps the command line quick.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from bitmill.errors import BitmillError
from bitmill.integrations.transformers_hook import register_with_transformers
from bitmill.openmp import limit_spinning
from bitmill.version import __version__

if TYPE_CHECKING:
    from bitmill.api import CalibrationData, load, load_tokenizer
    from bitmill.formats.quantized import Quantized
    from bitmill.kv.cache import QuantizedCache
    from bitmill.recipes.recipe import Recipe
    from bitmill.workflows.comparison.compare import compare
    from bitmill.workflows.estimate import estimate
    from bitmill.workflows.evaluate import evaluate
    from bitmill.workflows.export.run import export
    from bitmill.workflows.imports.run import import_checkpoint
    from bitmill.workflows.lint.run import lint
    from bitmill.workflows.qat import convert_qat, prepare_qat, set_qat_temperature
    from bitmill.workflows.quantize.run import Outcome, quantize
    from bitmill.workflows.tasks import evaluate_tasks
    from bitmill.workflows.train import train

__all__ = [
    "BitmillError",
    "CalibrationData",
    "Outcome",
    "Quantized",
    "QuantizedCache",
    "Recipe",
    "__version__",
    "compare",
    "convert_qat",
    "estimate",
    "evaluate",
    "evaluate_tasks",
    "export",
    "import_checkpoint",
    "lint",
    "load",
    "load_tokenizer",
    "prepare_qat",
    "quantize",
    "set_qat_temperature",
    "train",
]

_HOMES = {
    "CalibrationData": "bitmill.api",
    "Outcome": "bitmill.api",
    "compare": "bitmill.workflows.comparison.compare",
    "convert_qat": "bitmill.api",
    "estimate": "bitmill.api",
    "evaluate": "bitmill.api",
    "evaluate_tasks": "bitmill.api",
    "export": "bitmill.api",
    "import_checkpoint": "bitmill.api",
    "lint": "bitmill.api",
    "load": "bitmill.api",
    "load_tokenizer": "bitmill.api",
    "prepare_qat": "bitmill.api",
    "quantize": "bitmill.api",
    "Quantized": "bitmill.formats.quantized",
    "QuantizedCache": "bitmill.kv.cache",
    "Recipe": "bitmill.recipes.recipe",
    "set_qat_temperature": "bitmill.api",
    "train": "bitmill.api",
}


_RENAMED = {"Calibration": "CalibrationData"}  # until the next release


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        new = _RENAMED[name]
        warnings.warn(f"bitmill.{name} is now called bitmill.{new}.", FutureWarning, stacklevel=2)
        return __getattr__(new)
    if name not in _HOMES:
        raise AttributeError(f"module 'bitmill' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


limit_spinning()
register_with_transformers()
