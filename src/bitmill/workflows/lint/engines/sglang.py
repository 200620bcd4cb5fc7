"""SGLang 0.5.23.

Source: sglang/srt/layers/quantization/{gptq,awq}.py and compressed_tensors/.
"""

from __future__ import annotations

from typing import ClassVar

from bitmill.workflows.lint.base import ENGINES
from bitmill.workflows.lint.engines.vllm import Server


@ENGINES.register("sglang")
class SGLang(Server):
    """Integers of 4 and 8 bits."""

    name: ClassVar[str] = "sglang"
    title: ClassVar[str] = "SGLang"
    packed_bits: ClassVar[tuple[int, ...]] = (4, 8)
