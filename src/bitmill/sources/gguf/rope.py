"""Llama 3's rotary scaling, found again in the frequency factors that a GGUF stores in its place.

llama.cpp writes, per rotary frequency f = theta^(-2i/d), the factor by which f is divided: 1 for wavelengths
below original/high, `factor` above original/low, and 1 / ((1-s)/factor + s) between, with
s = (original/wavelength - low) / (high - low).  transformers wants the four constants.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from bitmill.errors import SourceError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LOW, HIGH, ORIGINAL = 1.0, 4.0, 8192  # of every Llama 3.1 to 3.3 model


def llama3_factors(theta: float, head_dim: int, factor: float) -> torch.Tensor:
    """The factors (head_dim / 2,) of Llama 3's scaling."""
    wavelength = 2 * math.pi * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    smooth = ((ORIGINAL / wavelength - LOW) / (HIGH - LOW)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def undo_rope_factors(config: PretrainedConfig, factors: torch.Tensor) -> None:
    """Put the scaling that `factors` (head_dim / 2,) describes into `config.rope_parameters`.

    Raises SourceError when they are not Llama 3's.
    """
    theta, factor = config.rope_parameters["rope_theta"], float(factors.max())
    expected = llama3_factors(theta, config.head_dim, factor)
    if factors.shape != expected.shape or not torch.allclose(factors.double(), expected, rtol=1e-3):
        raise SourceError(
            f"The {factors.numel()} rotary factors in the GGUF file (largest {factor:g}) are not Llama 3's, "
            "and no others can be read; use the safetensors folder of this model."
        )
    config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": LOW,
        "high_freq_factor": HIGH,
        "original_max_position_embeddings": ORIGINAL,
    }
