"""Quantize an F16 GGUF file as `llama-quantize` does by default: python gguf_quantize.py IN OUT TYPE."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import llama_cpp as ll

TYPES = {
    "Q4_0": ll.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_1": ll.LLAMA_FTYPE_MOSTLY_Q4_1,
    "Q3_K": ll.LLAMA_FTYPE_MOSTLY_Q3_K_M,  # what llama-quantize calls Q3_K
    "Q8_0": ll.LLAMA_FTYPE_MOSTLY_Q8_0,
}


def main() -> None:
    source, out, name = sys.argv[1:]
    partial = Path(out).with_suffix(".partial")
    params = ll.llama_model_quantize_default_params()
    params.ftype, params.nthread = TYPES[name], 0
    if ll.llama_model_quantize(source.encode(), str(partial).encode(), ctypes.byref(params)):
        raise SystemExit(f"{source} could not be quantized to {name}.")
    partial.rename(out)


if __name__ == "__main__":
    main()
