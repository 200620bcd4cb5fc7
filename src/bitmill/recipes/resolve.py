"""Resolve a recipe on a model: the scheme of every layer, and the errors of rules that do not fit the model.

The first rule that matches a layer decides. Refused, with the names: a rule that matches no layer, a rule whose layers
are all decided by rules before it, and rules that contradict each other on layers that belong together:

fused group     linears that serving engines merge into one matrix need one format
seam            a channel scale is folded into all linears that read the seam, so that they need equal seam transforms
shared parts    layers that share codebooks across blocks need one format
"""

from __future__ import annotations

from collections.abc import Iterable

from bitmill.errors import RecipeError, UsageError
from bitmill.models.streamed import StreamedModel
from bitmill.recipes.recipe import Recipe
from bitmill.recipes.scheme import LayerScheme

Schemes = dict[str, LayerScheme | None]  # full layer name -> its scheme, or None where it stays in float


def resolve_schemes(recipe: Recipe, streamed: StreamedModel) -> Schemes:
    """Return the scheme of every linear of every block, in order.

    Raises:
        UsageError: a rule matches nothing, or no layer would be quantized.
        RecipeError: a rule decides no layer, or rules contradict each other.
    """
    _check_rules(recipe, streamed)
    blocks = [streamed.block_name(index) for index in range(len(streamed.blocks))]
    linears = streamed.adapter.linears
    schemes = {
        name: recipe.scheme(name) for name in (f"{block}.{linear}" for block in blocks for linear in linears)
    }
    if not any(schemes.values()):
        raise UsageError(f"The recipe {recipe.name!r} ignores every linear layer, so nothing would be quantized.")
    for block in blocks:
        for group in streamed.adapter.fused:
            _check_fused(recipe, schemes, [f"{block}.{linear}" for linear in group])
        for seam in streamed.adapter.seams:
            _check_seam(recipe, schemes, [f"{block}.{linear}" for linear in seam.targets])
    for linear in linears:
        _check_shared(recipe, schemes, [f"{block}.{linear}" for block in blocks])
    return schemes


def _check_rules(recipe: Recipe, streamed: StreamedModel) -> None:
    """Raise for a rule that matches no layer, or decides none because earlier rules match all of its layers."""
    named = streamed.model.named_parameters(remove_duplicate=False)
    matrices = [name.removesuffix(".weight") for name, weight in named if weight.dim() == 2]
    blocks = tuple(f"{streamed.block_name(index)}." for index in range(len(streamed.blocks)))
    first = f"{streamed.block_name(0)}.{streamed.adapter.linears[0]}"
    for rule in recipe.rules:
        matched = [name for name in matrices if rule.matches(name)]
        if not matched:
            raise UsageError(
                f"No layer with a matrix of weights is called {rule.sites!r}, as a rule of the recipe {recipe.name!r} "
                f"expects; patterns match whole names such as {first!r}, and * stands for any characters."
            )
        if not rule.is_float and not any(name.startswith(blocks) for name in matched):
            raise UsageError(
                f"The rule {rule.sites!r} of the recipe {recipe.name!r} matches {matched[0]!r} alone, which is "
                "no linear layer of a block; set the format of embedding and head with --head-bits (head)."
            )
        if all(recipe.rule_for(name) is not rule for name in matched):
            earlier = {r.sites: None for name in matched if (r := recipe.rule_for(name))}
            raise RecipeError(
                f"The rule {rule.sites!r} of the recipe {recipe.name!r} decides no layer: "
                f"{_list(repr(sites) for sites in earlier)} before it {'matches' if len(earlier) == 1 else 'match'} "
                f"all of its layers ({_list(matched)}); put it first, or remove it."
            )


def _check_fused(recipe: Recipe, schemes: Schemes, layers: list[str]) -> None:
    formats = {layer: scheme and scheme.format for layer, scheme in _known(schemes, layers)}
    if len(set(formats.values())) > 1:
        raise RecipeError(
            f"The recipe {recipe.name!r} gives layers that engines fuse into one matrix different formats: "
            f"{_formats(formats)}; give all of them one format, such as by a pattern that matches all."
        )


def _check_seam(recipe: Recipe, schemes: Schemes, layers: list[str]) -> None:
    quantized = {layer: scheme for layer, scheme in _known(schemes, layers) if scheme is not None}
    if not any(scheme.seam_transforms for scheme in quantized.values()):
        return
    if len({(scheme.seam_transforms, scheme.weight.core) for scheme in quantized.values()}) > 1:
        chosen = {
            layer: " ".join([t.name for t in scheme.seam_transforms] or ["no transform"])
            + f" for {scheme.weight!r}"
            for layer, scheme in quantized.items()
        }
        raise RecipeError(
            f"The recipe {recipe.name!r} scales the channels that several layers read, and its rules contradict each "
            f"other: {_formats(chosen)}; give all of them equal transforms and formats."
        )


def _check_shared(recipe: Recipe, schemes: Schemes, layers: list[str]) -> None:
    quantized = {layer: scheme for layer, scheme in _known(schemes, layers) if scheme is not None}
    if len(set(quantized.values())) > 1 and any(scheme.format.shared for scheme in quantized.values()):
        formats = {layer: scheme.format for layer, scheme in quantized.items()}
        raise RecipeError(
            f"The recipe {recipe.name!r} lets layers of all blocks share codebooks, and its rules give them different "
            f"formats: {_formats(formats)}; give all of them one format, or keep some in float."
        )


def _known(schemes: Schemes, layers: list[str]) -> list[tuple[str, LayerScheme | None]]:
    return [(layer, schemes[layer]) for layer in layers if layer in schemes]


def _formats(chosen: dict[str, object]) -> str:
    """One example layer for each choice."""
    examples = {
        repr(value) if not isinstance(value, str) else value: layer for layer, value in reversed(chosen.items())
    }
    return ", ".join(
        f"{layer!r} {'float' if value == 'None' else value}" for value, layer in reversed(examples.items())
    )


def _list(names: Iterable[str], most: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
