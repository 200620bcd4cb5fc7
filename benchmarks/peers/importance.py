"""The importance matrix of llama.cpp: mean squares of the inputs of the linear layers.

llama-imatrix collects them from a text, which it splits in its own way; torch collects them from token windows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from gguf_float import gguf_name

import bitmill


def importance_matrix(model: str, windows: Path, out: Path) -> Path:
    """Return a .npz file, name of a tensor in GGUF -> (in_features,) fp32, and its cost; made on first use.

    Args:
        model: Name of a demo model.
        windows: .npy file of token ids (windows, tokens).
        out: The .npz file, in which `cost` is the wall and the processor time in seconds.
    """
    if out.is_file():
        return out
    started = np.array(_clocks())
    live = bitmill.load(model)
    sums: dict[str, torch.Tensor] = {}
    for name, module in live.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            total = torch.zeros(module.in_features, dtype=torch.float64)
            sums[gguf_name(f"{name}.weight")] = total
            module.register_forward_pre_hook(_adding(total))
    tokens = torch.from_numpy(np.load(windows))
    with torch.inference_mode():
        for window in tokens:
            live(window[None], use_cache=False, logits_to_keep=1)
    means = {name: (total / tokens.numel()).float().numpy() for name, total in sums.items()}
    np.savez(out, cost=np.array(_clocks()) - started, **means)
    return out


def _clocks() -> tuple[float, float]:
    return time.monotonic(), time.process_time()


def _adding(total: torch.Tensor) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
    def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        total.add_(inputs[0].flatten(0, -2).square().sum(0))

    return hook
