"""vLLM 0.33.

Source: vllm/model_executor/layers/quantization/{auto_gptq,auto_awq,modelopt}.py, utils/gptq_utils.py and
compressed_tensors/.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from bitmill.workflows.lint.base import (
    ENGINES,
    Described,
    Engine,
    Finding,
    only_bits,
    only_groups,
    shuffled_groups,
    tied_head,
    unequal_fused,
)

_GROUPS = (32, 64, 128)
_READ = ("gptq", "awq", "compressed-tensors", "fp8", "modelopt")


class Server(Engine):
    """Base of the servers, which differ in the bits of compressed-tensors."""

    judged: ClassVar[str] = "judged from its source; it was not run"
    target: ClassVar[str] = "compressed-tensors"
    title: ClassVar[str]
    packed_bits: ClassVar[tuple[int, ...]]

    def findings(self, model: Described) -> Iterator[Finding]:
        """Yield what the server would not load."""
        if model.kind not in _READ:
            yield Finding("", f"{self.title} does not read {model.kind} by itself; export to {self.target}.")
            return
        if model.kind == "gptq":
            yield from only_bits(model, self.title, (4, 8), symmetric=True)
            yield from shuffled_groups(model, self.title)
        if model.kind == "awq":
            yield from only_bits(model, self.title, (4,))
        if model.kind == "compressed-tensors":
            yield from only_bits(model, self.title, self.packed_bits)
            yield from shuffled_groups(model, self.title)
        if model.kind in ("gptq", "awq"):
            yield from only_groups(model, self.title, _GROUPS)
        yield from unequal_fused(model, self.title)
        yield from tied_head(model, self.title)


@ENGINES.register("vllm")
class VLLM(Server):
    """Integers of 2 to 8 bits."""

    name: ClassVar[str] = "vllm"
    title: ClassVar[str] = "vLLM"
    packed_bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 5, 6, 7, 8)
