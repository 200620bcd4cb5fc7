"""llama.cpp, which reads GGUF files alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from bitmill.exports.gguf_blocks import unsupported_reason
from bitmill.workflows.lint.base import ENGINES, Described, Engine, Finding

_EXPORTED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")


@ENGINES.register("llama.cpp")
class LlamaCpp(Engine):
    """GGUF files."""

    name: ClassVar[str] = "llama.cpp"
    judged: ClassVar[str] = "exports of bitmill were run with it"
    target: ClassVar[str] = "gguf"

    def findings(self, model: Described) -> Iterator[Finding]:
        """Yield that another kind of checkpoint is not read."""
        if model.kind != "gguf":
            yield Finding("", f"llama.cpp reads .gguf files and no {model.kind}; bitmill import, then export it.")

    def findings_of_folder(self, model: Described) -> Iterator[Finding]:
        """Yield what the export to gguf cannot hold."""
        if model.model_type not in _EXPORTED:
            yield Finding("", f"Models of type {model.model_type!r} are not exported to gguf.")
            return
        for name, layer in model.inside.items():
            if reason := unsupported_reason(layer):
                yield Finding(name, f"The export to gguf cannot hold it: {reason}.")
                return
