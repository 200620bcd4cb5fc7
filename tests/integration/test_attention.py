"""Queries, keys, values and probabilities that attention rounds, from the recipe to a loaded folder."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import bitmill
from bitmill.architectures.attention import enable_rounded_attention, round_attention
from bitmill.cli.main import main
from bitmill.errors import NumericsError, RecipeError
from bitmill.pipeline.attention import Recorder, static_parameters
from bitmill.recipes.attention import Attention, parse_attention
from bitmill.recipes.compose import compose
from bitmill.recipes.method import build_recipe
from bitmill.recipes.recipe import Recipe
from helpers.tiny_models import tiny_model
from helpers.workspace import save_model, write_text

EIGHT = ("queries=uniform:bits=8", "keys=uniform:bits=8", "values=uniform:bits=8")
TOKENS = torch.arange(3, 27)[None]


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens).logits


def recipe(*attention):
    return compose(build_recipe("rtn", {"bits": 8}), attention=attention)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2", "mistral", "opt"])
def test_without_rounding_equals_sdpa(kind):
    model = tiny_model(kind).eval()
    expected = logits(model)
    enable_rounded_attention(model)
    assert torch.equal(logits(model), expected)  # nothing is marked
    round_attention(model, {"queries": Recorder()})
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=1e-5)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), TOKENS], 1)
    mask = (torch.arange(28) >= 4).long()[None]
    with torch.no_grad():
        found = model(padded, attention_mask=mask).logits[:, 4:]
        round_attention(model, {})
        again = model(padded, attention_mask=mask).logits[:, 4:]
    torch.testing.assert_close(found, again, atol=2e-5, rtol=1e-5)


def test_each_site_changes_the_model():
    model = tiny_model("llama").eval()
    expected = logits(model)
    enable_rounded_attention(model)
    errors = {}
    for site in ("queries", "keys", "values", "probabilities"):
        for bits in (3, 8):
            round_attention(model, parse_attention([f"{site}=uniform:bits={bits}"]).roundings())
            errors[site, bits] = float((logits(model) - expected).norm() / expected.norm())
    assert all(0 < errors[site, 8] < 0.1 * errors[site, 3] for site, _ in errors)


def test_decoding_equals_one_pass():
    model = tiny_model("llama").eval()
    enable_rounded_attention(model)
    round_attention(model, parse_attention(EIGHT).roundings())
    expected, cache, steps = logits(model), None, []
    with torch.no_grad():
        for token in TOKENS[0]:
            output = model(token.view(1, 1), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), expected, atol=1e-4, rtol=1e-4)


def test_stored_loaded_and_in_place(tmp_path):
    source = save_model(tmp_path / "float")
    chosen = recipe(*EIGHT, "probabilities=uniform:bits=8,symmetric=false")
    assert Recipe.from_yaml(chosen.to_yaml()) == chosen
    bitmill.quantize(source, chosen, out=tmp_path / "out", measure=0)
    plain = bitmill.quantize(bitmill.load(source), build_recipe("rtn", {"bits": 8}), measure=0).model
    live = bitmill.quantize(bitmill.load(source), chosen, measure=0).model
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    dense = bitmill.load(tmp_path / "out", dense=True)
    expected = logits(loaded)
    assert not torch.equal(expected, logits(plain))
    assert torch.equal(logits(live), expected)
    torch.testing.assert_close(logits(dense), expected, atol=1e-3, rtol=1e-3)
    assert torch.equal(logits(copy.deepcopy(loaded)), expected)
    loaded.save_pretrained(tmp_path / "copy")
    assert torch.equal(logits(bitmill.load(tmp_path / "copy")), expected)
    assert "simulated" in (tmp_path / "out" / "README.md").read_text()


def test_command_line(tmp_path, capsys):
    source = str(save_model(tmp_path / "float"))
    arguments = [
        "quantize",
        source,
        "--method",
        "rtn",
        "--bits",
        "8",
        "--measure",
        "0",
        "-o",
        str(tmp_path / "out"),
    ]
    assert main([*arguments, "--attention", "keys=uniform:bits=4", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["attention"]["keys"]["bits"] == 4
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert main(["inspect", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("spelled", "sentence"),
    [
        ("keys", "write SITE=FORMAT"),
        ("heads=uniform", "attention has no 'heads'"),
        ("keys=nonsense", "There is no format 'nonsense'"),
        ("keys=uniform:bits=99", "bits"),
        ("values=float16", "There is no format 'float16'"),
        ("keys=codebook:bits=3,group_size=tensor", "share a table"),
        ("keys=uniform:bits=8,static=true", "no scale from calibration"),
        ("values=pyramid:bits=4,static=true", "no scale from calibration"),
        ("keys=uniform:bits=8,channels=true", "values alone"),
    ],
)
def test_refused(spelled, sentence):
    with pytest.raises(RecipeError, match=sentence):
        recipe(spelled)


def test_a_site_of_two_formats():
    with pytest.raises(RecipeError, match="two formats for keys"):
        recipe("keys=uniform:bits=8", "keys=uniform:bits=4")


def test_broken_rows_stay_visible():
    x = torch.randn(3, 8)
    x[1, 2] = torch.nan
    found = parse_attention(["keys=uniform:bits=8"]).roundings()["keys"](x)
    assert torch.isnan(found).all(1).tolist() == [False, True, False]


def test_nothing_named():
    with pytest.raises(RecipeError, match="names no format"):
        Attention.from_dict({})


def test_model_of_another_attention():
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    with pytest.raises(RecipeError, match="cannot be rounded"):
        enable_rounded_attention(model)


def text(folder):
    return bitmill.CalibrationData(write_text(folder / "text.txt"), samples=4, seqlen=32)


STATIC = "uniform:bits=8,group_size=tensor,static=true"


def test_static_scales_of_every_site(tmp_path):
    source = save_model(tmp_path / "float")
    chosen = recipe(*(f"{site}={STATIC}" for site in ("queries", "keys", "values", "probabilities")))
    result = bitmill.quantize(source, chosen, out=tmp_path / "out", measure=0, calib=text(tmp_path))
    stored = result.report["recipe"]["attention"]
    assert all(len(stored[site]["parameters"]) == 2 for site in stored)
    assert stored["keys"]["parameters"][0] != stored["keys"]["parameters"][1]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    plain = bitmill.quantize(bitmill.load(source), build_recipe("rtn", {"bits": 8}), measure=0).model
    off = float((logits(loaded) - logits(plain)).norm() / logits(plain).norm())
    assert 0 < off < 0.05
    assert main(["verify", str(tmp_path / "out")]) == 0
    again = Recipe.from_dict(stored_recipe := result.report["recipe"])
    assert again.to_dict() == stored_recipe


@pytest.mark.parametrize("format", ["uniform:bits=8", "float"])
def test_static_numbers_beyond_the_range(format):
    attention = parse_attention([f"keys={format},group_size=tensor,static=true".replace("float,", "float:")])
    recorder = Recorder()
    recorder(torch.linspace(-2, 2, 64).view(4, 16))
    params = static_parameters(attention.static_format("keys"), recorder, "the keys")
    rounding = attention.calibrated({"keys": [params]}).roundings()["keys"]
    x = torch.tensor([[0.0, 1.0, 100.0, -100.0], [torch.inf, 0, 0, 0], [0, torch.nan, 0, 0]])
    found = rounding(x)
    assert torch.isfinite(found[0]).all()
    assert found[0].abs().max() < 2.1
    assert torch.isnan(found[1:]).all()


def test_static_parameters_of_silent_and_broken_numbers():
    format = parse_attention([f"keys={STATIC}"]).static_format("keys")
    silent = Recorder()
    silent(torch.zeros(4, 16))
    params = static_parameters(format, silent, "the keys")
    assert all(torch.isfinite(value).all() for value in params.values())
    assert params["scale"] > 0
    for value in (torch.nan, torch.inf):
        broken = Recorder()
        broken(torch.ones(4, 16))
        broken(torch.full((4, 16), value))
        broken(torch.ones(4, 16))
        with pytest.raises(NumericsError, match="The keys reach"):
            static_parameters(format, broken, "the keys")


def test_static_values_behind_scaled_channels(tmp_path):
    source = save_model(tmp_path / "float")
    chosen = compose(build_recipe("smoothquant", {}), attention=[f"values={STATIC}"])
    with pytest.raises(RecipeError, match="smoothquant scales their"):
        bitmill.quantize(source, chosen, out=tmp_path / "out", measure=0, calib=text(tmp_path))
    kept = compose(build_recipe("smoothquant", {}), attention=[f"keys={STATIC}"])
    bitmill.quantize(source, kept, out=tmp_path / "out", measure=0, calib=text(tmp_path))
