"""transformers 5, with the packages that its quantizers need.

Source: transformers/quantizers/auto.py; checkpoints of this test were loaded with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from bitmill.workflows.lint.base import ENGINES, Described, Engine, Finding, only_bits, weight_format

_READ = ("gptq", "awq", "compressed-tensors", "bitsandbytes", "fp8", "gguf")


@ENGINES.register("transformers")
class Transformers(Engine):
    """Folders of bitmill where it is imported, and those of other programs with their packages."""

    name: ClassVar[str] = "transformers"
    judged: ClassVar[str] = "bitmill and compressed-tensors were loaded with it; others are judged from its source"
    target: ClassVar[str] = "compressed-tensors"

    def findings(self, model: Described) -> Iterator[Finding]:
        """Yield what transformers would not load."""
        if model.kind not in _READ:
            yield Finding("", f"transformers has no quantizer for {model.kind}; bitmill import it, or export it.")
            return
        if model.kind == "gptq":
            yield from only_bits(model, "gptqmodel", (2, 3, 4, 8))
        if model.kind == "awq":
            yield from only_bits(model, "gptqmodel", (4,))
        if model.kind in ("gptq", "awq"):
            for name, layer in model.layers.items():
                if any(side % 32 for side in layer.shape):
                    yield Finding(name, f"Its shape {layer.shape} is no multiple of 32, which gptqmodel needs.")
                    return
        if model.kind == "compressed-tensors":
            zeros = (n for n, each in model.layers.items() if not getattr(weight_format(each), "symmetric", True))
            if (with_zeros := next(zeros, None)) is not None:
                yield Finding(
                    with_zeros,
                    "It has zeros, which transformers reads with quantization_config="
                    "CompressedTensorsConfig(dequantize=True) alone.",
                )

    def findings_of_folder(self, model: Described) -> Iterator[Finding]:
        """Yield nothing: where bitmill is imported, transformers reads its folders."""
        return iter(())
