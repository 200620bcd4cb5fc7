"""Quantize an F16 GGUF file as `llama-quantize` does by default: python gguf_quantize.py IN OUT TYPE."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import llama_cpp as ll


def main() -> None:
    source, out, name = sys.argv[1:]
    quantize(Path(source), Path(out), name, ll.llama_model_quantize_default_params())


def quantize(source: Path, out: Path, name: str, params: ll.llama_model_quantize_params) -> None:
    """Write `out`; whole or not at all.

    Args:
        source: GGUF file of floats.
        out: GGUF file.
        name: Type of the weights, as llama-quantize calls it.
        params: Of llama.cpp, without the type.
    """
    partial = out.with_suffix(".partial")
    name = {"Q3_K": "Q3_K_M"}.get(name, name)  # what llama-quantize calls Q3_K
    params.ftype = getattr(ll, f"LLAMA_FTYPE_MOSTLY_{name}")
    if ll.llama_model_quantize(str(source).encode(), str(partial).encode(), ctypes.byref(params)):
        raise SystemExit(f"{source} could not be quantized to {name}.")
    partial.rename(out)


if __name__ == "__main__":
    main()
