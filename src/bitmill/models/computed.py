"""Parameters that no checkpoint holds, because the model computes them: sinusoidal positions of Marian."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def compute_unstored(model: Any, missing: Iterable[str], device: torch.device) -> None:
    """Give parameters their values where transformers leaves them out of checkpoints.

    Args:
        model: a model of transformers, with parameters on the meta device.
        missing: names of parameters that the source does not hold.
        device: of the values.
    """
    unstored = set(missing).intersection(getattr(model, "_keys_to_ignore_on_save", None) or ())
    for name in sorted(unstored):
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        empty = torch.empty_like(module._parameters[leaf], device=device)
        module._parameters[leaf] = nn.Parameter(empty, requires_grad=False)
        with torch.no_grad():
            model._init_weights(module)
