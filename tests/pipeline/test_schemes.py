"""Layers of several schemes in one block: statistics, Fisher diagonals, and independence of each other."""

from __future__ import annotations

import torch

import bitmill
from bitmill.pipeline import block as block_module
from bitmill.recipes.compose import compose
from bitmill.recipes.method import build_recipe
from bitmill.recipes.recipe import Recipe
from helpers.tiny_models import tiny_model

WINDOWS = torch.randint(3, 100, (4, 16), generator=torch.Generator().manual_seed(0))


def packed(recipe: Recipe, name: str) -> dict[str, torch.Tensor]:
    """Return the packed tensors of a layer of a tiny model quantized in place."""
    model = tiny_model("llama")
    bitmill.quantize(model, recipe, calib=WINDOWS)
    return model.get_submodule(name).packed()


def test_codes_do_not_depend_on_the_needs_of_other_rules():
    base = compose(build_recipe("rtn", {"bits": 4, "group_size": 16}), sparse=0.05)
    mixed = Recipe.from_dict(
        {**base.to_dict(), "rules": [{"sites": "*.o_proj", "solver": build_recipe("gptq").solver.to_dict()}]}
    )
    assert mixed.needs == {"gram"}
    expected, found = (packed(recipe, "model.layers.0.mlp.down_proj") for recipe in (base, mixed))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_fisher_of_a_seams_source_is_rescaled(monkeypatch):
    rescaled = []
    original = block_module.rescale_fisher

    def record(F, W, scaled):
        rescaled.append(tuple(W.shape))
        return original(F, W, scaled)

    monkeypatch.setattr(block_module, "rescale_fisher", record)
    recipe = build_recipe("squeezellm", {"bits": 3}).to_dict()
    rule = {"sites": "*.down_proj", "transforms": [{"transform": "equalize"}]}
    model = tiny_model("llama")
    source = model.model.layers[0].mlp.up_proj.weight.shape
    bitmill.quantize(model, Recipe.from_dict({**recipe, "rules": [rule]}), calib=WINDOWS)
    assert tuple(source) in rescaled
