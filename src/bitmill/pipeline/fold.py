"""Apply a recipe's transforms to the seams of one block in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from bitmill.numerics.statistics import Statistics
from bitmill.pipeline.job import Job
from bitmill.transforms.base import SeamTransform, SeamView, fold


@torch.no_grad()
def fold_transforms(job: Job, index: int, seen: dict[str, Statistics] | None = None) -> dict[str, Tensor]:
    """Fold every seam transform of the recipe into every seam of block `index`.

    seen: what the block's linears read, by the linear that stands for its stage; kept true as scales change.
    Returns the tensors that changed and stay in float (norms, biases, ignored linears), by full name, in
    their stored type, which is also what the block now computes with.
    """
    streamed = job.streamed
    block, adapter = streamed.blocks[index], streamed.adapter
    seen = {} if seen is None else seen
    prefix = streamed.block_name(index)
    linears = [name for name in adapter.linears if job.quantizes(f"{prefix}.{name}")]
    schemes = {name: job.scheme(f"{prefix}.{name}") for name in linears}
    touched: set[str] = set()
    chains = dict.fromkeys(scheme.transforms for scheme in schemes.values())
    pairs = [(t, transforms) for transforms in chains for t in transforms if isinstance(t, SeamTransform)]
    for transform, chain in pairs:
        for seam in adapter.seams:
            coded = [name for name in seam.targets if name in schemes and schemes[name].transforms == chain]
            if not coded:
                continue  # nobody would gain
            parameters = dict(block.named_parameters())
            targets = [_matrix(parameters[f"{name}.weight"], adapter.transposed) for name in coded]
            source = _matrix(parameters[f"{seam.source}.weight"], adapter.transposed)
            source = source + 1 if seam.norm_plus_one else source
            lead = next((name for name in seam.targets if name in seen), "")
            stats = seen.get(lead, Statistics())
            view = SeamView(source, targets, schemes[coded[0]].weight.core, stats, seam.heads)
            scale = transform.choose(view)
            for name, tensor in fold(scale, seam, parameters, adapter.transposed).items():
                parameters[name].data = tensor
                touched.add(f"{prefix}.{name}")
            if lead:
                seen[lead] = seen[lead].scale(view.columns(scale))
    quantized = {f"{prefix}.{name}.weight" for name in schemes}
    changed = {}
    for name in sorted((touched & set(streamed.names())) - quantized):
        stored = streamed.model.get_parameter(name).data.to(streamed.dtype(name))
        streamed.set_parameter(name, stored.float())
        changed[name] = stored
    return changed


def _matrix(weight: Tensor, transposed: bool) -> Tensor:
    return weight.T if transposed and weight.dim() == 2 else weight
