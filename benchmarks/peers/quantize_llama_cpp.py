"""Quantize an F16 GGUF file with llama.cpp and an importance matrix, in its own environment: see quantize.py.

The embedding stays in F16, as it stays in float in the folders of the other programs.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import llama_cpp as ll
import numpy as np
from gguf_quantize import quantize
from peer_arguments import report, request

F16 = 1  # ggml_type


def main() -> None:
    asked = request()
    matrix = np.load(asked.tokens)
    rows = {name: matrix[name] for name in matrix.files if name != "cost"}
    entries = (ll.llama_model_imatrix_data * (len(rows) + 1))()  # the last one is empty, which ends them
    for entry, (name, row) in zip(entries, rows.items(), strict=False):
        entry.name, entry.size = name.encode(), row.size
        entry.data = row.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params = ll.llama_model_quantize_default_params()
    params.nthread = int(os.environ["OMP_NUM_THREADS"])
    params.imatrix = ctypes.cast(entries, ctypes.POINTER(ll.llama_model_imatrix_data))
    params.token_embedding_type = params.output_tensor_type = F16
    quantize(Path(asked.model), asked.out / "model.gguf", asked.setting, params)
    report(asked, ll.__version__, f"{asked.setting} with an importance matrix")


if __name__ == "__main__":
    main()
