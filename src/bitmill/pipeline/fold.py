"""Apply a recipe's transforms to the seams of one block in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from bitmill.architectures.adapter import Seam
from bitmill.numerics.statistics import Statistics
from bitmill.pipeline.job import Job
from bitmill.pipeline.ranges import to_stored
from bitmill.recipes.scheme import LayerScheme
from bitmill.transforms.base import SeamTransform, SeamView, fold


@torch.no_grad()
def fold_transforms(job: Job, index: int, stats: dict[str, Statistics] | None = None) -> dict[str, Tensor]:
    """Fold the seam transforms of every layer's scheme into the seams of one block.

    Args:
        job: the model, and the scheme of every layer.
        index: a block in memory.
        stats: statistics of the block's inputs, by the first linear of each stage; scaled with the inputs.

    Returns:
        The changed tensors that stay in float (norms, biases, float linears), by full name, in their stored type,
        in which the block also computes from now on.
    """
    streamed, stats = job.streamed, {} if stats is None else stats
    prefix = streamed.block_name(index)
    linears = [name for name in streamed.linears(index) if job.quantizes(f"{prefix}.{name}")]
    schemes = {name: job.scheme(f"{prefix}.{name}") for name in linears}
    changed: set[str] = set()
    for transforms in dict.fromkeys(scheme.transforms for scheme in schemes.values()):
        layers = {name: scheme for name, scheme in schemes.items() if scheme.transforms == transforms}
        for transform in transforms:
            if isinstance(transform, SeamTransform):
                for seam in streamed.seams_inside(index):
                    changed |= _fold_seam(job, index, transform, seam, layers, stats)
    quantized = {f"{prefix}.{name}.weight" for name in schemes}
    floats = {}
    for name in sorted((changed & set(streamed.names())) - quantized):
        floats[name] = to_stored(name, streamed.model.get_parameter(name).data, streamed.dtype(name))
        streamed.set_parameter(name, floats[name].float())
    return floats


def _fold_seam(
    job: Job,
    index: int,
    transform: SeamTransform,
    seam: Seam,
    schemes: dict[str, LayerScheme],
    stats: dict[str, Statistics],
) -> set[str]:
    """Fold one transform into one seam, and return the full names of the changed tensors.

    Nothing changes where none of the seam's targets is in `schemes`, the layers that this transform serves.
    """
    streamed = job.streamed
    block, transposed = streamed.blocks[index], streamed.adapter.transposed
    quantized = [name for name in seam.targets if name in schemes]
    if not quantized:
        return set()
    parameters = dict(block.named_parameters())
    targets = [_matrix(parameters[f"{name}.weight"], transposed) for name in quantized]
    source = _matrix(parameters[f"{seam.source}.weight"], transposed)
    source = source + 1 if seam.norm_plus_one else source
    lead = next((name for name in seam.targets if name in stats), "")
    format = schemes[quantized[0]].weight.core
    view = SeamView(source, targets, format, stats.get(lead, Statistics()), seam.heads)
    scale = transform.choose(view)
    tensors = fold(scale, seam, parameters, transposed)
    for name, tensor in tensors.items():
        parameters[name].data = tensor
    if lead:
        stats[lead] = stats[lead].scale(view.columns(scale))
    return {f"{streamed.block_name(index)}.{name}" for name in tensors}


def _matrix(weight: Tensor, transposed: bool) -> Tensor:
    """Return a weight as (out, in), or the weight of a norm."""
    return weight.T if transposed and weight.dim() == 2 else weight
