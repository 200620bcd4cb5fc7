"""The schemes among which a plan chooses: those of methods at several bits, and float."""

from __future__ import annotations

from collections.abc import Sequence

from bitmill.errors import RecipeError, UsageError
from bitmill.formats import FORMATS
from bitmill.recipes.compose import find_recipe
from bitmill.recipes.method import METHODS
from bitmill.recipes.recipe import Recipe
from bitmill.recipes.scheme import LayerScheme
from bitmill.sensitivities.candidate import FLOAT_LABEL, Candidate
from bitmill.solvers import SOLVERS

METHODS_BY_DEFAULT = ("gptq", "pvq", "quip_sharp")  # uniform, pyramid and lattice
BITS = (2, 3, 4, 5, 6, 8)
HEAD_BITS = (3, 4, 5, 6, 8)


def block_candidates(methods: Sequence[str | Recipe]) -> list[Candidate]:
    """Return the candidates of the linears of blocks, and float.

    Args:
        methods: recipes, or names of methods, each at all its bits of BITS, or recipe files.

    Raises:
        UsageError: a method cannot be a candidate, with the reason, or there is none.
    """
    if not methods:
        raise UsageError(
            "There is no method to choose from; name some with --methods (methods), such as gptq,pvq."
        )
    found: dict[str, Candidate] = {}
    for method in methods:
        for label, recipe in _recipes(method):
            _check(str(method) if isinstance(method, str) else recipe.name, recipe)
            inputs = recipe.default.inputs
            candidate = Candidate(
                label + (f", {inputs.format.rate:g}-bit inputs" if inputs else ""), recipe.default
            )
            found.setdefault(candidate.key, candidate)
    return [*found.values(), Candidate(FLOAT_LABEL)]


def head_candidates() -> list[Candidate]:
    """Return the candidates of embedding and head, which are rounded to nearest, and float."""
    nearest = SOLVERS.from_dict({"solver": "nearest", "search": True})
    formats = [FORMATS.from_dict({"format": "uniform", "bits": bits}) for bits in HEAD_BITS]
    made = [Candidate(f"uniform {format.bits}-bit", LayerScheme(format, nearest)) for format in formats]
    return [*made, Candidate(FLOAT_LABEL)]


def _recipes(method: str | Recipe) -> list[tuple[str, Recipe]]:
    """Return label and recipe of a method at all its bits."""
    if isinstance(method, Recipe):
        return [(f"{method.name} {method.default.format.rate:.3g}-bit", method)]
    if method not in METHODS.names() or "bits" not in METHODS.options(method):
        recipe = find_recipe(method)
        return [(recipe.name, recipe)]
    made = []
    for bits in BITS:
        try:
            made.append((f"{method} {bits}-bit", find_recipe(method, {"bits": bits})))
        except RecipeError:  # the method does not have these bits
            continue
    return made or [(method, find_recipe(method))]


def _check(name: str, recipe: Recipe) -> None:
    """Raise UsageError for a recipe whose layers cannot be chosen one by one."""
    scheme = recipe.default
    reasons = {
        "it has rules of its own": bool(recipe.rules),
        "it tunes whole blocks": bool(recipe.tuners),
        "it scales channels that several layers read": bool(scheme.seam_transforms),
        "a scale of its inputs comes from calibration": scheme.inputs is not None and scheme.inputs.static,
        "it rounds the inputs of transformed layers": scheme.inputs is not None and bool(scheme.transforms),
        "it rounds what attention multiplies": recipe.attention is not None,
        "its layers share parts across blocks": bool(scheme.format.shared),
    }
    if reason := next((reason for reason, holds in reasons.items() if holds), None):
        raise UsageError(
            f"The method {name!r} cannot be a candidate of a budget, because {reason}; leave it out of --methods "
            "(methods)."
        )
