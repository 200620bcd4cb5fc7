"""Resolve a recipe on a model: the scheme of every layer, and the errors of rules that do not fit the model.

The first rule that matches a layer decides. Refused, with the names: a rule that matches no layer, a rule that
decides no layer because earlier rules match all of its layers, and rules that contradict each other on layers that
belong together:

fused group     linears that serving engines merge into one matrix need one format
seam            a channel scale is folded into all linears that read it, which need equal transforms and formats
shared parts    layers that share codebooks across blocks need one format
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from bitmill.architectures.site import Site
from bitmill.errors import RecipeError, UsageError
from bitmill.formats import Format
from bitmill.models.embedding_and_head import EmbeddingAndHead
from bitmill.models.streamed import StreamedModel
from bitmill.recipes.embedding_and_head import HeadFormats, choose_head_formats
from bitmill.recipes.recipe import Recipe
from bitmill.recipes.scheme import LayerScheme
from bitmill.report.describe import describe_format
from bitmill.transforms import Transform

_VALUES = ("v_proj", "value")  # names of layers whose outputs attention multiplies with its probabilities
Schemes = dict[str, LayerScheme | None]  # full layer name -> its scheme, or None where it stays in float


@dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe on a model: the scheme of every layer.

    Attributes:
        recipe: the recipe, with the format of embedding and head that it gives this model.
        schemes: full name of every linear of every block -> its scheme, or None where it stays in float.
        ends: the quantized ones of embedding and head; None where both stay in float.
        head_formats: their formats, by path.
        note: sentences where layers have other formats than the recipe asks for, or embedding or head stay in
            float though nothing asks for it; "" otherwise.
    """

    recipe: Recipe
    schemes: Schemes
    ends: EmbeddingAndHead | None = None
    head_formats: dict[str, Format] = field(default_factory=dict)
    note: str = ""

    @cached_property
    def formats(self) -> dict[str, Format]:
        """The stored format of every quantized layer, embedding and head last."""
        formats = {layer: scheme.format for layer, scheme in self.schemes.items() if scheme is not None}
        return formats | self.head_formats

    @cached_property
    def used_schemes(self) -> tuple[LayerScheme, ...]:
        """All distinct schemes of layers, in the order of the layers."""
        return tuple(dict.fromkeys(scheme for scheme in self.schemes.values() if scheme is not None))

    @property
    def head_layers(self) -> tuple[str, ...]:
        """Embedding and head, where they are quantized."""
        return tuple(self.head_formats)

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that calibration must collect; empty for a data-free recipe."""
        needs = [scheme.needs for scheme in self.used_schemes] + [tuner.needs for tuner in self.recipe.tuners]
        attention = self.recipe.attention
        return (attention.needs if attention else frozenset[str]()).union(*needs)

    @property
    def shares_parts(self) -> bool:
        """True where layers share parts across blocks, such as codebooks."""
        return any(scheme.format.shared for scheme in self.used_schemes)


def resolve_recipe(recipe: Recipe, streamed: StreamedModel) -> ResolvedRecipe:
    """Resolve a recipe on a model.

    Args:
        recipe: the recipe.
        streamed: the model; no weight is read.

    Raises:
        UsageError: a rule matches nothing, or no layer would be quantized.
        RecipeError: a rule decides no layer, or rules contradict each other.
        SourceError: embedding and head are to be quantized, and the model has none that can be.
    """
    schemes = {site.layer: _for_columns(recipe.scheme(site.layer), site) for site in streamed.all_sites()}
    head = choose_head_formats(recipe, streamed, schemes)
    _check_rules(recipe, streamed, schemes, head)
    if not any(schemes.values()):
        raise UsageError(f"The recipe {recipe.name!r} ignores every linear layer, so nothing would be quantized.")
    for index in range(len(streamed.blocks)):
        for group in streamed.fused_layers(index):
            _check_fused(recipe, schemes, group)
        for seam in streamed.seams(index):
            _check_seam(recipe, schemes, seam.targets)
            if seam.kind == "linear" and seam.source.rpartition(".")[2] in _VALUES:
                _check_static_values(recipe, schemes, seam.targets)
    for linear in streamed.adapter.linears:
        names = [f"{streamed.block_name(index)}.{linear}" for index in range(len(streamed.blocks))]
        like = [name for name in names if name in schemes]
        _check_shared(recipe, schemes, like)
    note = " ".join(filter(None, (_note_of_columns(recipe, schemes), head.note)))
    return ResolvedRecipe(head.recipe, schemes, head.ends, head.formats, note)


def _for_columns(scheme: LayerScheme | None, site: Site) -> LayerScheme | None:
    """Return a scheme with a format whose blocks fill the rows, see `Format.for_columns`."""
    if scheme is None:
        return None
    weight = scheme.weight.for_columns(site.shape[1])
    return scheme if weight is scheme.weight else replace(scheme, weight=weight)


def _note_of_columns(recipe: Recipe, schemes: Schemes) -> str:
    """Return which layers have another format, as their rows are no whole blocks; "" where none has."""
    changed = {}
    for layer, scheme in schemes.items():
        asked = recipe.scheme(layer)
        if scheme is not None and asked is not None and scheme.weight != asked.weight:
            changed[layer] = f"{_words(scheme.weight)} in place of {_words(asked.weight)}"
    if not changed:
        return ""
    kinds = ", ".join(dict.fromkeys(changed.values()))
    return f"{len(changed)} of {len(schemes)} layers are stored as {kinds}: their columns are no whole blocks."


def _check_rules(recipe: Recipe, streamed: StreamedModel, schemes: Schemes, head: HeadFormats) -> None:
    """Raise for a rule that matches no layer, or decides none because earlier rules match all of its layers."""
    named = streamed.model.named_parameters(remove_duplicate=False)
    matrices = [name.removesuffix(".weight") for name, weight in named if weight.dim() == 2]
    for rule in recipe.rules:
        matched = [name for name in matrices if rule.matches(name)]
        if not matched and rule.optional:
            continue
        if not matched and any(rule.matches(name.rpartition(".")[0]) for name in matrices):
            raise UsageError(
                f"The rule {rule.sites!r} of the recipe {recipe.name!r} names a module or tensor of several "
                f"matrices; write {rule.sites + '.*'!r} for all of them."
            )
        if not matched:
            raise UsageError(
                f"No layer with a matrix of weights is called {rule.sites!r}, as a rule of the recipe "
                f"{recipe.name!r} expects; patterns match whole names such as {next(iter(schemes))!r}, and * "
                "stands for any characters."
            )
        inside, outside = ([name for name in matched if name in names] for names in (schemes, head.names))
        decidable = matched if rule.is_float else inside or outside
        if not decidable:
            raise UsageError(
                f"The rule {rule.sites!r} of the recipe {recipe.name!r} matches {_list(matched)}, no linear layer "
                "of a block, token embedding or head, and other tensors stay in float; leave out the rule."
            )
        if all(recipe.rule_for(name) is not rule for name in decidable):
            earlier = dict.fromkeys(repr(r.sites) for name in decidable if (r := recipe.rule_for(name)))
            raise RecipeError(
                f"The rule {rule.sites!r} of the recipe {recipe.name!r} decides no layer, because rules before it "
                f"({_list(earlier)}) match all of its layers ({_list(decidable)}); put it first, or remove it."
            )


def _check_fused(recipe: Recipe, schemes: Schemes, layers: Sequence[str]) -> None:
    chosen = {layer: schemes[layer] for layer in layers if layer in schemes}
    formats = {layer: scheme and scheme.format for layer, scheme in chosen.items()}
    if len(set(formats.values())) > 1:
        raise RecipeError(
            f"The recipe {recipe.name!r} gives layers that engines fuse into one matrix different formats: "
            f"{_examples(formats)}; give all of them one format, such as by a pattern that matches all."
        )


def _check_seam(recipe: Recipe, schemes: Schemes, layers: Sequence[str]) -> None:
    quantized = _quantized(schemes, layers)
    if not any(scheme.seam_transforms for scheme in quantized.values()):
        return
    chosen = {layer: (scheme.seam_transforms, scheme.weight.core) for layer, scheme in quantized.items()}
    if len(set(chosen.values())) > 1:
        raise RecipeError(
            f"The recipe {recipe.name!r} scales channels that several layers read, and its rules contradict each "
            f"other: {_examples(chosen)}; give all of them equal transforms and formats."
        )


def _check_static_values(recipe: Recipe, schemes: Schemes, layers: Sequence[str]) -> None:
    """Raise where values that attention multiplies are scaled after their static parameters were calibrated."""
    if recipe.attention is None or "values" not in recipe.attention.static:
        return
    scaled = [tuner.name for tuner in recipe.tuners if tuner.scales_channels]
    scaled += [each.name for scheme in _quantized(schemes, layers).values() for each in scheme.seam_transforms]
    if scaled:
        raise RecipeError(
            f"The static scale of attention's values is that of the float model, and {scaled[0]} scales their "
            "channels; leave static out for values, or leave out the scaling."
        )


def _check_shared(recipe: Recipe, schemes: Schemes, layers: Sequence[str]) -> None:
    quantized = _quantized(schemes, layers)
    if len(set(quantized.values())) > 1 and any(scheme.format.shared for scheme in quantized.values()):
        formats = {layer: scheme.format for layer, scheme in quantized.items()}
        raise RecipeError(
            f"The recipe {recipe.name!r} lets layers of all blocks share codebooks, and its rules contradict "
            f"that: {_examples(formats)}; give all of them one format, or keep some in float."
        )


def _quantized(schemes: Schemes, layers: Sequence[str]) -> dict[str, LayerScheme]:
    return {layer: scheme for layer in layers if (scheme := schemes.get(layer)) is not None}


def _examples(chosen: Mapping[str, object]) -> str:
    """Return every distinct choice in words, with the first layer that has it."""
    examples: dict[object, str] = {}
    for layer, choice in chosen.items():
        examples.setdefault(choice, layer)
    return ", ".join(f"{layer!r} {_words(choice)}" for choice, layer in examples.items())


def _words(choice: object) -> str:
    """Return a choice of formats and transforms in words."""
    if choice is None:
        return "float"
    if isinstance(choice, Format):
        return describe_format(choice.to_dict())
    if isinstance(choice, tuple):
        return " ".join(_words(part) for part in choice) or "without transforms for"
    return f"{choice.name} for" if isinstance(choice, Transform) else str(choice)


def _list(names: Iterable[str], most: int = 3) -> str:
    """Return the first names of a list, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
