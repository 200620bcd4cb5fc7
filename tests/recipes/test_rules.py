"""Rules of a recipe: parsing, round trips, the scheme of every layer, and contradictions that are refused."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from bitmill.errors import RecipeError, UsageError
from bitmill.formats.uniform import Uniform
from bitmill.models.streamed import StreamedModel
from bitmill.recipes.compose import compose
from bitmill.recipes.method import build_recipe
from bitmill.recipes.recipe import Recipe
from bitmill.recipes.resolve import resolve_recipe
from bitmill.recipes.rules import FLOAT, Rule, parse_rule
from bitmill.solvers.gptq import GPTQ
from bitmill.solvers.nearest import Nearest
from bitmill.sources.open import open_source
from helpers.tiny_models import tiny_model

RTN = build_recipe("rtn", {"bits": 3, "group_size": 16})


def streamed(name: str = "llama") -> StreamedModel:
    return StreamedModel(open_source(tiny_model(name)))


def with_rules(*rules: Rule, base: Recipe = RTN) -> Recipe:
    return replace(base, rules=rules)


def test_first_match_wins():
    recipe = with_rules(Rule("model.layers.0.*", FLOAT), Rule("*.down_proj", Uniform(8, 16)))
    schemes = resolve_recipe(recipe, streamed()).schemes
    assert schemes["model.layers.0.mlp.down_proj"] is None
    assert schemes["model.layers.1.mlp.down_proj"].format == Uniform(8, 16)
    assert schemes["model.layers.1.self_attn.o_proj"] == recipe.default


def test_rule_defaults():
    base = build_recipe("gptq", {"bits": 3})
    recipe = with_rules(Rule("*.o_proj", solver=Nearest()), Rule("*.down_proj", Uniform(8)), base=base)
    assert recipe.scheme("a.o_proj").weight == base.weight
    assert recipe.scheme("a.down_proj").solver == base.solver


def test_needs_of_all_rules():
    assert with_rules(Rule("*.o_proj", solver=GPTQ())).needs == {"gram"}


@pytest.mark.parametrize(
    "rules",
    [
        (),
        (Rule("*.o_proj", FLOAT),),
        (Rule("*.o_proj", FLOAT), Rule("*.down_proj", Uniform(8, 16), Nearest(), ())),
        (Rule("*.down_proj", Uniform(8, 16)), Rule("*.o_proj", FLOAT)),
    ],
)
def test_round_trip(rules):
    recipe = with_rules(*rules)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert Recipe.from_yaml(recipe.to_json()) == recipe


def test_float_rules_written_as_ignore():
    data = with_rules(Rule("*.o_proj", FLOAT)).to_dict()
    assert data["ignore"] == ["*.o_proj"]
    assert "rules" not in data


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("*.down_proj=uniform:bits=8", Rule("*.down_proj", Uniform(8))),
        ("*.down_proj = uniform", Rule("*.down_proj", Uniform(3))),
        ("*.o_proj=float", Rule("*.o_proj", FLOAT)),
    ],
)
def test_parse_rule(text, rule):
    assert parse_rule(text, RTN.weight) == rule


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("*.down_proj", "incomplete"),
        ("=uniform", "incomplete"),
        ("*.o_proj=unifrom", "no format 'unifrom'"),
        ("*.o_proj=uniform:bit=4", "no option 'bit'"),
        ("*.o_proj=uniform:bits=99", "bits"),
    ],
)
def test_wrong_rule_text(text, reason):
    with pytest.raises(RecipeError, match=reason):
        compose(RTN, rules=[text])


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ({"sites": ""}, "rules.0.sites"),
        ({"sites": "*", "weight": "int8"}, "weight 'int8'; use float"),
        ({"sites": "*", "format": {}}, "rules.0.format"),
        ({"sites": "*"}, "changes nothing"),
        ({"sites": "*", "weight": "float", "solver": {"solver": "nearest"}}, "keeps its layers in float"),
        ({"sites": "*", "weight": {"format": "e8", "scale": "row"}}, "no option"),
    ],
)
def test_wrong_rule_document(rule, reason):
    with pytest.raises(RecipeError, match=reason):
        Recipe.from_dict({**build_recipe("gptq").to_dict(), "rules": [rule]})


def test_rules_precede_base():
    base = with_rules(Rule("*.o_proj", FLOAT))
    assert compose(base, rules=["*.o_proj=uniform:bits=8"]).scheme("a.o_proj").weight.bits == 8


@pytest.mark.parametrize(
    ("rules", "kind", "reason"),
    [
        ([Rule("*.down_porj", Uniform(8))], UsageError, "called '*.down_porj'"),
        ([Rule("model.norm", Uniform(8))], UsageError, "called 'model.norm'"),
        (
            [Rule("*_proj", Uniform(8)), Rule("*.o_proj", FLOAT)],
            RecipeError,
            "'*.o_proj' of the recipe 'rtn' decides",
        ),
        ([Rule("*.v_proj", Uniform(8))], RecipeError, "'model.layers.0.self_attn.v_proj' uniform (bits 8"),
        ([Rule("*.v_proj", FLOAT)], RecipeError, "'model.layers.0.self_attn.v_proj' float"),
        ([Rule("*", FLOAT)], UsageError, "ignores every linear layer"),
        ([Rule("model.layers.*", Uniform(8)), Rule("*e*", Uniform(2))], RecipeError, "'*e*' of the recipe 'rtn'"),
    ],
)
def test_rules_for_other_model(rules, kind, reason):
    with pytest.raises(kind, match=re.escape(reason)):
        resolve_recipe(with_rules(*rules), streamed())


def test_conflicting_rules_at_seam():
    awq = build_recipe("awq", {"bits": 3})
    assert resolve_recipe(with_rules(Rule("*.o_proj", Uniform(8)), base=awq), streamed()).formats
    model = streamed("opt")
    both = Rule("*.q_proj", awq.weight, transforms=()), Rule("*.k_proj", awq.weight, transforms=())
    with pytest.raises(RecipeError, match="scales channels that several layers read"):
        resolve_recipe(with_rules(*both, base=awq), model)


def test_conflicting_rules_shared():
    aqlm = build_recipe("aqlm", {"shared": True})
    recipe = with_rules(Rule("model.layers.0.self_attn.o_proj", Uniform(8), Nearest()), base=aqlm)
    with pytest.raises(RecipeError, match="share codebooks"):
        resolve_recipe(recipe, streamed())


def test_rule_replaces_an_equal_pattern_of_the_base():
    recipe = compose(with_rules(Rule("*.o_proj", FLOAT)), rules=["*.o_proj=uniform:bits=8,group_size=16"])
    assert resolve_recipe(recipe, streamed()).formats["model.layers.0.self_attn.o_proj"] == Uniform(8, 16)


def test_needs_of_schemes_without_layers_do_not_count():
    recipe = with_rules(Rule("model.layers.*", Uniform(8, 16), Nearest()), base=build_recipe("gptq", {"bits": 3}))
    assert recipe.needs == {"gram"}
    assert resolve_recipe(recipe, streamed()).needs == frozenset()
