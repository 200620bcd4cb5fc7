"""Error of the formats on a Gaussian source, above the least error that any code of as many bits can have.

R bits a number leave of a Gaussian source a mean squared error of at least 4^-R times its variance, however many
numbers are coded jointly (Shannon 1959). Weights in a rotated basis are nearly Gaussian: their distance from the
bound is what a better format could still gain.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitmill.config.arguments import checked_arguments
from bitmill.errors import UsageError, quoted
from bitmill.formats import FORMATS, GroupFormat
from bitmill.formats.quantized import fit_matrix, nearest_matrix
from bitmill.models.streamed import StreamedModel
from bitmill.numerics.rotations import rotation
from bitmill.solvers.base import squared_norm
from bitmill.sources.open import open_source

SHAPE = (64, 4096)  # of the Gaussian matrix
_LARGEST = 1 << 18  # weights of a layer that are read

# name, bits, group size
CASES: tuple[tuple[str, int, int | str], ...] = (
    *(("uniform", bits, "row") for bits in range(1, 5)),
    *(("uniform", bits, 64) for bits in range(1, 5)),
    *(("half_integer", bits, "row") for bits in range(1, 5)),
    *(("codebook", bits, "row") for bits in range(1, 5)),
    *(("binary_coding", bits, "row") for bits in range(1, 5)),
    *(("normal_float", bits, "row") for bits in (2, 3, 4)),
    ("microscaling", 4, 32),
    ("nvfp4", 4, 16),
    ("e8", 2, "tensor"),
    *(("pyramid", bits, "row") for bits in range(1, 5)),
    *(("trellis", bits, "row") for bits in range(1, 5)),
)


@torch.no_grad()
@checked_arguments("on_case")
def bench_formats(
    model: str | Path | None = None,
    formats: tuple[str, ...] = (),
    bits: tuple[int, ...] = (),
    on_case: Callable[[str], None] = lambda name: None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Round a Gaussian matrix, or a rotated layer of a model, to every format.

    Args:
        model: take the last linear layer of its middle block, in a Hadamard basis of inputs and outputs; by
            default Gaussian numbers.
        formats: only these formats; all when empty.
        bits: only these bits; all when empty.
        on_case: called with the name of each case before it runs.
        trust_remote_code: allow Python code that comes with the model.

    Returns:
        Plain data: source ("gaussian" or the layer's name), shape, and `formats`, for every case format, bits,
        group_size, bits_per_weight (all stored), error (of the variance), bound (at as many bits), excess_dB (of
        the error over the bound) and weights_per_s (of fitting and rounding).

    Raises:
        UsageError: there is no such case.
        SourceError: there is no such model.
    """
    cases = _cases(formats, bits)
    name, W = _gaussian() if model is None else _rotated_layer(model, trust_remote_code)
    results = []
    for format in cases:
        on_case(repr(format))
        results.append(_measure(format, W))
    return {"source": name, "shape": list(W.shape), "formats": results}


def _cases(formats: tuple[str, ...], bits: tuple[int, ...]) -> list[GroupFormat]:
    names = sorted({name for name, _, _ in CASES})
    if unknown := [name for name in formats if name not in names]:
        raise UsageError(f"--format is {quoted(unknown[0])}; use one of {', '.join(names)}.")
    named = [case for case in CASES if not formats or case[0] in formats]
    chosen = [case for case in named if not bits or case[1] in bits]
    if not chosen:
        widths = sorted({width for _, width, _ in named})
        raise UsageError(f"--bits is {', '.join(map(str, bits))}; use some of {', '.join(map(str, widths))}.")
    return [FORMATS.get(name)(bits=width, group_size=size) for name, width, size in chosen]  # type: ignore


def _measure(format: GroupFormat, W: Tensor) -> dict[str, Any]:
    start = time.perf_counter()
    stored = nearest_matrix(format, W, fit_matrix(format, W, None, search=True))
    seconds = time.perf_counter() - start
    error = squared_norm(W - stored.dequantize()) / squared_norm(W)
    bound = 4.0**-stored.bits_per_weight
    return {
        "format": format.name,
        "bits": format.bits,
        "group_size": format.group_size,
        "bits_per_weight": stored.bits_per_weight,
        "error": error,
        "bound": bound,
        "excess_dB": 10 * math.log10(error / bound),
        "weights_per_s": W.numel() / seconds,
    }


def _gaussian() -> tuple[str, Tensor]:
    return "gaussian", torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def _rotated_layer(model: str | Path, trust_remote_code: bool) -> tuple[str, Tensor]:
    """Return the name of a layer, and rows of its matrix in a Hadamard basis."""
    streamed = StreamedModel(open_source(model, trust_remote_code=trust_remote_code))
    site = streamed.sites(len(streamed.blocks) // 2)[-1]
    W = streamed.stored_tensor(site.path).float()
    W = W.T if streamed.adapter.transposed else W
    W = rotation("hadamard", W.shape[1], 0).forward(W)
    W = rotation("hadamard", W.shape[0], 1).forward(W.T).T
    return site.path.removesuffix(".weight"), W[: max(1, _LARGEST // W.shape[1])].contiguous()
