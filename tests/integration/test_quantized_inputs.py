"""Quantized inputs, from the recipe to the folder: what is measured while quantizing is what runs when loaded."""

from __future__ import annotations

import pytest
import torch

import bitmill
from bitmill.checkpoint.reader import open_checkpoint
from bitmill.errors import RecipeError
from bitmill.formats.quantized_inputs import QuantizedInputs
from bitmill.recipes.compose import compose
from bitmill.recipes.method import build_recipe
from bitmill.recipes.recipe import Recipe
from bitmill.report.text import storage_rows
from helpers.tiny_models import tiny_model
from helpers.workspace import save_model, write_text

INPUTS = {
    "threshold": "uniform:bits=8,threshold=2.0",
    "token": "uniform:bits=8",
    "columns": "uniform:bits=4,group_size=16,symmetric=false",
    "static": "uniform:bits=8,group_size=tensor,static=true",
    "fp8": "float:simulated=true",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "source", blocks=2)
    write_text(folder / "text.txt")
    return folder


@pytest.mark.parametrize(
    "transforms", [(), ("hadamard:sides=in",), ("permute",)], ids=["plain", "rotated", "permuted"]
)
@pytest.mark.parametrize("inputs", INPUTS)
def test_folder_runs_as_measured(source, tmp_path, inputs, transforms):
    if inputs == "static" and "hadamard:sides=in" in transforms:
        pytest.skip("magnitudes of columns have no counterpart in a rotated basis")
    recipe = compose(build_recipe("gptq", {"group_size": 16}), inputs=INPUTS[inputs], transforms=transforms)
    calib = bitmill.CalibrationData(source / "text.txt", samples=4, seqlen=32)
    outcome = bitmill.quantize(str(source / "source"), recipe, out=tmp_path / "out", calib=calib, measure=4)
    (measured,) = outcome.report["measured"]
    formats = open_checkpoint(tmp_path / "out").formats
    assert all(format.quantizes_inputs for name, format in formats.items() if "layers" in name)
    again = bitmill.evaluate(tmp_path / "out", text=source / "text.txt", seqlen=32, windows=4)
    assert again["perplexity"] == pytest.approx(measured["perplexity"], rel=1e-3)
    ids = torch.arange(20)[None] % 50
    with torch.no_grad():
        packed = bitmill.load(tmp_path / "out")(ids).logits
        dense = bitmill.load(tmp_path / "out", dense=True)(ids).logits
    assert (packed - dense).norm() <= 0.02 * dense.norm()


def test_recipe_round_trips(source):
    rules = ["*.down_proj=uniform:bits=8@uniform:bits=8,symmetric=false", "*.o_proj=@float"]
    recipe = compose(build_recipe("rtn"), inputs="uniform:bits=4", rules=rules)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    formats = {name: recipe.scheme(name).format for name in ("a.down_proj", "a.o_proj", "a.q_proj")}
    assert formats["a.down_proj"].inputs.symmetric is False
    assert not formats["a.o_proj"].quantizes_inputs
    assert isinstance(formats["a.q_proj"], QuantizedInputs)
    assert formats["a.q_proj"].inputs.bits == 4


def test_pairs_without_a_kernel_are_refused():
    with pytest.raises(RecipeError, match="simulated=true"):
        compose(build_recipe("rtn"), inputs="float:bits=8")


def test_tokens_with_nan_or_inf_have_nan(source):
    format = QuantizedInputs(build_recipe("rtn").weight, build_recipe("rtn", {"group_size": "row"}).weight)
    x = torch.randn(4, 8)
    x[1, 2], x[2, 3] = torch.nan, torch.inf
    rounded = format.effective_inputs(x, {})
    assert rounded[1].isnan().all()
    assert rounded[2].isnan().all()
    assert (rounded[[0, 3]] - x[[0, 3]]).norm() < 0.1 * x[[0, 3]].norm()


def test_pyramid_weights_and_inputs():
    recipe = compose(build_recipe("pvq", {"bits": 4}), inputs="pyramid:bits=4,simulated=true")
    model = tiny_model("llama")
    tokens = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(0))
    expected = model(tokens).logits.detach()
    outcome = bitmill.quantize(model, recipe, calib=tokens, measure=0)
    logits = outcome.model(tokens).logits
    assert 0 < (logits - expected).norm() < 0.2 * expected.norm()
    assert "simulated" in dict(storage_rows(outcome.summary))["inputs"]
    format = recipe.scheme("a.q_proj").format
    assert isinstance(format.inner, QuantizedInputs)
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    rounded = format.inner.effective_inputs(x, {})
    assert (rounded - x).norm() < 0.12 * x.norm()
    torch.testing.assert_close(format.inner.effective_inputs(x[2:3], {}), rounded[2:3])  # tokens are independent


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ("pyramid:bits=4", "simulated=true"),
        ("additive:bits=8,simulated=true", "share a table"),
        ("pyramid:bits=4,group_size=tensor,static=true,simulated=true", "leave static out"),
        ("pyramid:bits=8,simulated=true", "1 to 4 bits"),
    ],
)
def test_refused_inputs(inputs, reason):
    with pytest.raises(RecipeError, match=reason):
        compose(build_recipe("pvq"), inputs=inputs)
