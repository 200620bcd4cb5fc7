"""An ordinary model in float, as transformers saves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bitmill.errors import NumericsError
from bitmill.exports.base import Layer
from bitmill.workflows.export.job import ExportJob, Writer
from bitmill.workflows.load import load


class DenseWriter(Writer):
    """Decodes every layer."""

    name, readers, ending = "dense", "any program that reads models in float", "-dense"

    def check(self, job: ExportJob) -> dict[str, Layer]:
        """Return no layers: all are decoded."""
        return {}

    def write(self, job: ExportJob, layers: dict[str, Layer], out: Path) -> list[str]:
        """Write the model. Raises NumericsError for a weight beyond the range of the type."""
        folder, checkpoint = job.checkpoint.folder, job.checkpoint
        model: Any = load(folder, dtype=job.dtype, dense=True, trust_remote_code=job.trust_remote_code)
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise NumericsError(f"{name} is beyond the range of {job.dtype}; use --dtype bfloat16.")
        model.save_pretrained(out)
        if any(format.quantizes_inputs for format in checkpoint.formats.values()):
            return ["Inputs of layers that the folder rounds are not rounded in the export."]
        return []
