"""Recipes from parts, users' recipes, and the leader of the leaderboard."""

from __future__ import annotations

import pytest

from bitmill.errors import RecipeError
from bitmill.recipes import defaults as leaderboard
from bitmill.recipes.compose import compose, find_recipe, from_parts
from bitmill.recipes.method import METHODS, build_recipe
from bitmill.recipes.recipe import Recipe


def base() -> Recipe:
    return build_recipe("gptq", {"bits": "3"})


def test_parts_replace_and_add():
    recipe = compose(base(), format="codebook:group_size=row", solver="gptq:damp=0.05", transforms=["equalize"])
    assert recipe.name == "gptq+codebook+gptq+equalize"
    assert (recipe.weight.name, recipe.weight.bits, recipe.weight.group_size) == ("codebook", 3, "row")
    assert recipe.solver.damp == 0.05
    assert [t.name for t in recipe.transforms] == ["equalize"]
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_bits_per_weight():
    assert build_recipe("aqlm", {"bits": 2}).weight.rate == 2
    assert build_recipe("quip_sharp").default.format.rate == 2
    assert compose(build_recipe("aqlm", {"bits": 2}), format="uniform", solver="nearest").weight.bits == 2


def test_recipe_from_parts():
    recipe = from_parts("codebook:group_size=row", "gptq:damp=0.05", {"bits": "2"})
    assert (recipe.name, recipe.weight.bits, recipe.solver.damp) == ("codebook+gptq", 2, 0.05)
    assert (recipe.transforms, recipe.tuners) == ((), ())
    assert from_parts("codebook:bits=4", "gptq", {"bits": "2"}).weight.bits == 4
    assert from_parts("uniform", "nearest").weight.bits == leaderboard.DEFAULT_BITS
    with pytest.raises(RecipeError, match="no method whose option 'damp'"):
        from_parts("uniform", "gptq", {"damp": "0.1"})


def test_number_spelling():
    recipe = compose(base(), format="float:bits=8,element=e5m2", solver="gptq:damp=1e-3,act_order=false")
    assert (recipe.solver.damp, recipe.solver.act_order, recipe.weight.element) == (1e-3, False, "e5m2")


def test_invalid_recipe_file(tmp_path):
    with pytest.raises(RecipeError, match=r"^There is no recipe file .*absent\.yaml; give .*\.$"):
        build_recipe(str(tmp_path / "absent.yaml"))
    file = tmp_path / "mine.yaml"
    for content, word in (
        (b"\xff", "not UTF-8"),
        (b"name: [", "not valid YAML"),
        (b"a: 2026-13-45", "not valid YAML"),
    ):
        file.write_bytes(content)
        with pytest.raises(RecipeError, match=word) as caught:
            build_recipe(str(file))
        assert "\n" not in str(caught.value)
        assert str(caught.value).count(". ") == 0


def test_no_changes():
    assert compose(base()) == base()


@pytest.mark.parametrize(
    ("parts", "word"),
    [
        ({"format": "paper"}, "no format 'paper'"),
        ({"format": "uniform:bats=3"}, "no option 'bats'"),
        ({"format": "uniform:bits"}, "'bits'"),
        ({"format": "uniform:bits=three"}, "bits of uniform is 'three'"),
        ({"format": "uniform:bits=[3"}, r"bits of uniform is '\[3'"),
        ({"solver": "gptq:damp=@"}, "damp of gptq is '@'"),
        ({"solver": "gptq:damp=2026-13-45"}, "damp of gptq is '2026-13-45'"),
        ({"solver": "magic"}, "no solver 'magic'"),
        ({"transforms": ["equalize:strength"]}, "strength"),
        ({"tuners": ["luck"]}, "no tuner 'luck'"),
    ],
)
def test_invalid_options_refused(parts, word):
    with pytest.raises(RecipeError, match=word) as caught:
        compose(base(), **parts)
    assert str(caught.value).endswith(".")


def test_illegal_combinations_refused():
    with pytest.raises(RecipeError, match="cannot be built"):
        compose(base(), format="integer_coding", solver="gptq:static_groups=false,act_order=false")


def test_user_recipe_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("BITMILL_RECIPES", str(tmp_path))
    with pytest.raises(RecipeError, match="mine"):
        find_recipe("mine")
    (tmp_path / "mine.yaml").write_text(compose(base(), transforms=["equalize"]).to_yaml())
    assert [t.name for t in find_recipe("mine").transforms] == ["equalize"]
    (tmp_path / "rtn.yaml").write_text(base().to_yaml())  # named methods keep their names
    assert find_recipe("rtn").name == "rtn"


def row(method: str, bits: int, bpw: float, kl: float, minutes: float) -> leaderboard.Row:
    return leaderboard.Row(method, bits, bpw, 20.0, kl, minutes)


def test_leader_within_time(monkeypatch):
    rows = (row("quick", 3, 3.2, 0.3, 1), row("slow", 3, 3.2, 0.1, 60), row("large", 3, 3.8, 0.05, 1))
    monkeypatch.setattr(leaderboard, "rows", lambda: rows)
    assert leaderboard.leader(3, 5).method == "quick"
    assert leaderboard.leader(3, 100).method == "slow"
    assert leaderboard.leader(2) is None


def test_leaderboard_methods_exist():
    for entry in leaderboard.rows():
        bits = {"bits": entry.bits} if "bits" in METHODS.get(entry.method).__dataclass_fields__ else {}
        assert build_recipe(entry.method, bits).name


@pytest.mark.parametrize(
    ("options", "name", "bits"),
    [
        ({}, "gptq", 3),  # gptq's own default is 4
        ({"bits": "4"}, "gptq", 4),
        ({"bits": 2}, "quip_sharp", 2),  # which has no option bits
        ({"bits": 1}, "gptqt", 1),  # not on the table
        ({"bits": 8}, "gptq", 8),  # nor that, and gptqt has no 8 bits
        ({"group_size": "row"}, "gptq", 3),
        ({"bits": 2, "group_size": 32}, "rtn", 2),  # quip_sharp leads, and has no groups
    ],
)
def test_leader_bits(monkeypatch, options, name, bits):
    table = [row("gptq", bits, bits + 0.3, 0.1, 1) for bits in (3, 4)] + [row("quip_sharp", 2, 2.0, 0.9, 1)]
    others = [row("rtn", bits, bits + 0.3, 2.0, 1) for bits in (2, 3, 4)]
    monkeypatch.setattr(leaderboard, "rows", lambda: tuple(table + others))
    recipe, why = leaderboard.leading_recipe(options)
    assert (recipe.name, recipe.default.format.core.bits) == (name, bits)
    assert why.startswith("no method was named")
    assert name in why


def test_leader_options_refused():
    for options, word in (({"bits": "three"}, "whole number"), ({"luck": 1}, "no option 'luck'")):
        with pytest.raises(RecipeError, match=word):
            leaderboard.leading_recipe(options)
