"""Apply a recipe's transforms to the seams of one block in memory."""

from __future__ import annotations

from torch import Tensor

from bitmill.models.skeleton import Skeleton
from bitmill.recipe import Recipe
from bitmill.transforms.base import fold


def fold_transforms(recipe: Recipe, skeleton: Skeleton, index: int) -> dict[str, Tensor]:
    """Fold every transform of the recipe into every seam of block `index`.

    Returns the tensors that changed and stay in float (norms, biases, ignored linears), by full name, in
    their stored type, which is also what the block now computes with.
    """
    if not recipe.transforms:
        return {}
    block, adapter = skeleton.blocks[index], skeleton.adapter
    touched: set[str] = set()
    for transform in recipe.transforms:
        for seam in adapter.seams:
            source = block.get_submodule(seam.source)
            targets = [block.get_submodule(name) for name in seam.targets]
            weights = [_matrix(m.weight, adapter.transposed) for m in targets]
            written = _matrix(source.weight, adapter.transposed)
            if written.shape[0] != weights[0].shape[1]:
                continue  # grouped queries: one head of v feeds several of o's inputs
            if seam.norm_plus_one:
                written = written + 1
            fold(transform.choose(written, weights), source, targets, seam.norm_plus_one, adapter.transposed)
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
