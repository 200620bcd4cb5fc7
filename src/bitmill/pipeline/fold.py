"""Apply a recipe's transforms to the seams of one block in memory."""

from __future__ import annotations

from torch import Tensor

from bitmill.models.skeleton import Skeleton
from bitmill.recipe import Recipe
from bitmill.transforms.base import Activations, SeamTransform, SeamView, fold


def fold_transforms(
    recipe: Recipe, skeleton: Skeleton, index: int, seen: dict[str, Activations] | None = None
) -> dict[str, Tensor]:
    """Fold every seam transform of the recipe into every seam of block `index`.

    seen: what the block's linears read, by the linear that stands for its stage; kept true as scales change.
    Returns the tensors that changed and stay in float (norms, biases, ignored linears), by full name, in
    their stored type, which is also what the block now computes with.
    """
    seam_transforms = [t for t in recipe.transforms if isinstance(t, SeamTransform)]
    if not seam_transforms:
        return {}
    block, adapter = skeleton.blocks[index], skeleton.adapter
    seen = {} if seen is None else seen
    touched: set[str] = set()
    for transform in seam_transforms:
        for seam in adapter.seams:
            source = block.get_submodule(seam.source)
            targets = [block.get_submodule(name) for name in seam.targets]
            weights = [_matrix(m.weight, adapter.transposed) for m in targets]
            written = _matrix(source.weight, adapter.transposed)
            if written.shape[0] != weights[0].shape[1]:
                continue  # grouped queries: one head of v feeds several of o's inputs
            if seam.norm_plus_one:
                written = written + 1
            lead = next((name for name in seam.targets if name in seen), "")
            view = SeamView(written, weights, recipe.weight.core, seen.get(lead))
            scale = transform.choose(view)
            fold(scale, source, targets, seam.norm_plus_one, adapter.transposed)
            if lead:
                seen[lead] = seen[lead].divided(scale)
            for name in (seam.source, *seam.targets):
                touched |= {f"{skeleton.block_name(index)}.{name}.{leaf}" for leaf in ("weight", "bias")}
    quantized = {f"{skeleton.block_name(index)}.{name}" for name in adapter.linears}
    quantized = {f"{name}.weight" for name in quantized if not recipe.ignores(name)}
    changed = {}
    for name in sorted((touched & set(skeleton.names())) - quantized):
        stored = skeleton.model.get_parameter(name).data.to(skeleton.dtype(name))
        skeleton.set(name, stored.float())
        changed[name] = stored
    return changed


def _matrix(weight: object, transposed: bool) -> Tensor:
    assert isinstance(weight, Tensor)
    return weight.T if transposed and weight.dim() == 2 else weight
