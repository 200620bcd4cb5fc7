"""bitmill: quantize neural language models with published methods, to a bit budget, measured, and run them.

Importing it teaches transformers the checkpoint format, so that `from_pretrained` reads bitmill's folders.
"""

from bitmill.api import Calibration, Outcome, evaluate, load, load_tokenizer, quantize
from bitmill.errors import BitmillError
from bitmill.quantized import Quantized
from bitmill.recipe import Recipe
from bitmill.runtime import hf as _hf
from bitmill.version import __version__

_hf.register()

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
