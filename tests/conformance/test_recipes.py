"""Laws of named methods and of recipes."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import re

import pytest
import yaml

import bitmill
from bitmill.errors import RecipeError
from bitmill.formats.uniform import Uniform
from bitmill.recipes.method import METHODS, build_recipe, parse_group_size
from bitmill.recipes.recipe import Recipe
from bitmill.recipes.rules import FLOAT, Rule
from bitmill.solvers.gptq import GPTQ
from bitmill.solvers.nearest import Nearest
from bitmill.transforms.equalize import Equalize
from helpers.cases import all_formats, all_solvers

CARD = ("Problem", "Equation", "Needs", "Cost", "Expect", "Paper")
every_method = pytest.mark.parametrize("name", METHODS.names())
OPTIONS = [(name, field) for name, kind in METHODS.items() for field in dataclasses.fields(kind)]
every_option = pytest.mark.parametrize(("name", "option"), OPTIONS, ids=lambda o: getattr(o, "name", o))


@every_method
def test_builds_with_defaults(name):
    recipe = build_recipe(name)
    assert recipe.name == name
    assert recipe.needs <= {"gram", "cross", "fisher", "activations", "targets", "samples"}


@every_method
def test_yaml_and_json_round_trip(name):
    recipe = build_recipe(name)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert Recipe.from_yaml(recipe.to_json()) == recipe
    assert json.loads(recipe.to_json()) == yaml.safe_load(recipe.to_yaml()) == recipe.to_dict()


@every_method
@pytest.mark.parametrize("ending", ["yaml", "yml", "json"])
def test_file_round_trip(name, ending, tmp_path):
    recipe = build_recipe(name)
    file = tmp_path / f"recipe.{ending}"
    file.write_text(recipe.to_json() if ending == "json" else recipe.to_yaml())
    assert build_recipe(str(file)) == recipe
    with pytest.raises(RecipeError, match="bits"):
        build_recipe(str(file), {"bits": 3})


@every_method
def test_card_is_complete(name):
    card = METHODS.get(name).__doc__
    assert re.match(r".+\.\n\n", card), "a first sentence, then the card"
    for line in CARD:
        assert re.search(rf"^ +{line} {{2,}}\S", card, re.MULTILINE), f"the card of {name} has no {line!r}"


@every_option
def test_options_have_help(name, option):
    assert option.metadata["help"].strip()
    assert option.default is not dataclasses.MISSING


@every_option
def test_options_given_as_text(name, option):
    assert build_recipe(name, {option.name: str(option.default)}) == build_recipe(name)


@every_option
def test_wrong_option_type_refused(name, option):
    with pytest.raises(RecipeError) as caught:
        build_recipe(name, {option.name: "nonsense"})
    assert option.name in str(caught.value)


@every_option
def test_wrong_value_type_refused(name, option):
    wrong = [None, [1], {}, "nonsense"] + ([3.5] if option.type != "float" else [])
    accepted = []
    for value in wrong:
        with contextlib.suppress(RecipeError):
            build_recipe(name, {option.name: value})
            accepted.append(value)
    assert not accepted


@every_method
def test_unknown_options_refused(name):
    with pytest.raises(RecipeError, match="unheard_of"):
        build_recipe(name, {"unheard_of": 1})


@every_method
@pytest.mark.parametrize("bits", [0, -3, 99])
def test_impossible_bits_refused(name, bits):
    if "bits" in METHODS.get(name).__dataclass_fields__:
        with pytest.raises(RecipeError, match=str(bits)):
            build_recipe(name, {"bits": bits})


@every_method
def test_group_size_values(name):
    if "group_size" not in METHODS.get(name).__dataclass_fields__:
        return
    by_text = build_recipe(name, {"group_size": "32"})
    assert by_text == build_recipe(name, {"group_size": 32})
    assert by_text.weight.core.group_size == 32
    for wrong in ("0.5", "all", "-7", ""):
        with pytest.raises(RecipeError, match="group_size"):
            build_recipe(name, {"group_size": wrong})


def test_unknown_method_message():
    with pytest.raises(RecipeError, match="gptq") as caught:
        build_recipe("magic")
    assert all(name in str(caught.value) for name in METHODS.names())


def test_illegal_combinations_refused():
    pairs = [(f, s) for f in all_formats() if f.bits == 2 for s in all_solvers()]
    refused = [(f, s) for f, s in pairs if s.unsupported_reason(f)]
    assert refused
    for format, solver in refused:
        with pytest.raises(RecipeError, match="cannot be built"):
            Recipe("test", format, solver)
        with pytest.raises(RecipeError, match="cannot be built"):
            Recipe.from_dict({"name": "test", "weight": format.to_dict(), "solver": solver.to_dict()})
    with pytest.raises(RecipeError, match="static_groups"):
        build_recipe("gptq", {"static_groups": "false"})
    with pytest.raises(RecipeError, match="static_groups"):
        build_recipe("gptq", {"static_groups": False, "act_order": False, "group_size": "tensor"})


def test_all_fields_kept():
    recipe = Recipe(
        "mine", Uniform(3, "row", True), GPTQ(0.1, False, False), (Equalize(0.5),), (Rule("*.down_proj", FLOAT),)
    )
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert recipe.scheme("model.layers.3.mlp.down_proj") is None
    assert recipe.scheme("model.layers.3.mlp.up_proj") == recipe.default
    assert recipe.needs == {"gram"}
    assert Recipe("mine", Uniform(3), Nearest()).needs == set()


GOOD = build_recipe("rtn").to_dict()


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (None, "the document"),
        ([], "the document"),
        ("text", "the document"),
        ({}, "name"),
        ({**GOOD, "extra": 1}, "extra"),
        ({**GOOD, "name": ""}, "name"),
        ({**GOOD, "weight": None}, "weight"),
        ({**GOOD, "weight": {"format": "magic"}}, "magic"),
        ({**GOOD, "weight": {"bits": 3}}, "format"),
        ({**GOOD, "weight": {"format": "uniform", "bits": "three"}}, "three"),
        ({**GOOD, "solver": {"solver": "magic"}}, "magic"),
        ({**GOOD, "solver": {"solver": ["nearest"]}}, "solver"),
        ({**GOOD, "transforms": [{"transform": "magic"}]}, "magic"),
        ({**GOOD, "transforms": {"transform": "equalize"}}, "transforms"),
        ({**GOOD, "ignore": [3]}, "ignore"),
    ],
)
def test_damaged_recipe_message(data, word):
    with pytest.raises(RecipeError, match=word) as caught:
        Recipe.from_dict(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "a: b: c", "name: [", "\t- x", "!!python/object:os.system {}"])
def test_broken_yaml_message(text):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(text)
    assert "\n" not in str(caught.value)


def test_unreadable_file_message(tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    for name in ("absent.yaml", "bytes.yaml"):
        with pytest.raises(RecipeError, match=name):
            build_recipe(str(tmp_path / name))


def test_group_size_words():
    assert [parse_group_size(w) for w in ("64", 64, "row", "-1", -1, "tensor", "0", " ROW ")] == [
        *(64, 64, "row", "row", "row", "tensor", "tensor", "row")
    ]


@every_method
def test_options_are_no_arguments_of_quantize(name):
    options = {field.name for field in dataclasses.fields(METHODS.get(name))}
    assert not options & inspect.signature(bitmill.quantize).parameters.keys()
