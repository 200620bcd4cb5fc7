"""Fields of formats that follow from all weights of a network, such as one exponent, chosen before quantizing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from bitmill.calibration.walk import walk_blocks
from bitmill.formats import Format
from bitmill.models.streamed import StreamedModel
from bitmill.progress import Progress
from bitmill.recipes.recipe import Recipe


def recipe_of_network(recipe: Recipe, streamed: StreamedModel, progress: Progress) -> Recipe:
    """Return the recipe with `Format.of_network` of each of its weight formats.

    Args:
        recipe: the recipe.
        streamed: the model; its blocks are read once for every format that has such fields.
        progress: where progress is reported.
    """
    rules = tuple(
        replace(rule, weight=_of_network(rule.weight, recipe, streamed, progress))
        if isinstance(rule.weight, Format)
        else rule
        for rule in recipe.rules
    )
    return replace(recipe, weight=_of_network(recipe.weight, recipe, streamed, progress), rules=rules)


def _of_network(weight: Format, recipe: Recipe, streamed: StreamedModel, progress: Progress) -> Format:
    layers = [site.layer for site in streamed.all_sites()]
    stored = {layer for layer in layers if (scheme := recipe.scheme(layer)) and scheme.weight == weight}

    def matrices() -> Iterator[Tensor]:
        progress.start("weights of the network", len(streamed.blocks))
        for index, _ in walk_blocks(streamed, progress):
            for linear in streamed.adapter.linears:
                layer = f"{streamed.block_name(index)}.{linear}"
                if layer in stored:
                    yield streamed.matrix(f"{layer}.weight")
        progress.finish()

    return weight.of_network(matrices)
