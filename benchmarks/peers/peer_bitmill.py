"""bitmill: a quantized folder, its weights packed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bitmill.checkpoint.files import folder_bytes
from peer_torch import Transformers
from worker import serve

import bitmill
from bitmill.native import is_available, native
from bitmill.runtime.activations import activations


class Packed(Transformers):
    """The model that `bitmill.load` returns."""

    def load(self, model: Path, option: str) -> Any:
        self.folder = model
        return bitmill.load(model)

    def settings(self) -> dict[str, Any]:
        return {
            "version": bitmill.__version__,
            "kernels": native().isa() if is_available() else None,
            "activations": activations().name,
            "decode": _decode_path(self.model),
            "size_bytes": folder_bytes(self.folder),
        }


def _decode_path(model: Any) -> str:
    """Return the decode path: the compiled step, or the reason against it."""
    if find_spec("bitmill.runtime.decode") is None:
        return "transformers' own forward"
    from bitmill.runtime.decode import decode_path

    return str(decode_path(model))


if __name__ == "__main__":
    serve(Packed)
