"""The model card matches the report."""

from __future__ import annotations

import pytest
import yaml

from bitmill.recipes.compose import compose
from bitmill.recipes.method import METHODS, build_recipe
from bitmill.report.card import model_card
from helpers import sample_results

MEASURED = {
    "by": "quantize",
    "text": "pydoc",
    "split": "eval",
    "windows": 4,
    "seqlen": 512,
    "perplexity": 12.3456789,
    "reference_perplexity": 11.0,
    "kl_divergence": 0.0123456,
    "top1_agreement": 0.9,
}
CALIBRATION = {"source": "pydoc", "samples": 128, "seqlen": 512, "seed": 3, "sha256": "0123456789abcdef" * 4}


def layer(number: int, error: float | None) -> dict:
    name = f"model.layers.{number}.mlp.up_proj"
    return {"name": name, "bits_per_weight": 3.25, "weight_error": 0.01, "output_error": error}


def report(method: str = "gptq", **changes) -> dict:
    return {
        "bitmill": "0.1",
        "source": "smollm2-135m",
        "recipe": build_recipe(method).to_dict(),
        "identity": {"calibration": CALIBRATION},
        "bits_per_weight": 3.28125,
        "measured": [MEASURED],
        "layers": [layer(n, n / 100) for n in range(9)],
        **changes,
    }


def front_matter(card: str) -> dict:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize("method", METHODS.names())
def test_methods_have_cards(method):
    card = model_card(report(method))
    data = front_matter(card)
    assert data["base_model"] == "smollm2-135m"
    assert data["base_model_relation"] == "quantized"
    assert method in data["tags"]
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert recipe == build_recipe(method).to_dict()
    assert "3.281 bits per weight" in card
    assert "{{" not in card
    assert "{%" not in card


def table_rows(card: str, first: str) -> list[list[str]]:
    rows = [line for line in card.splitlines() if line.startswith(first)]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_inputs_are_named():
    recipe = compose(build_recipe("pvq"), inputs="pyramid:bits=4,simulated=true", rules=["*.o_proj=@float"])
    card = model_card(report(recipe=recipe.to_dict()))
    assert "rounded to pyramid (bits 4, group_size row), simulated: rounded, and multiplied in floats" in card
    assert "inputs float" in card
    assert "inputs are rounded" not in model_card(report())


def test_measurement_table():
    rows = table_rows(model_card(report(measured=[MEASURED, {**MEASURED, "by": "eval"}])), "| pydoc")
    assert rows[0] == ["pydoc, eval split", "4 x 512", "12.35", "11", "0.01235", "0.9", "bitmill quantize"]
    assert rows[1][-1] == "bitmill eval"


def test_missing_values_are_dashes():
    bare = {k: MEASURED[k] for k in ("by", "text", "split", "windows", "seqlen", "perplexity")}
    assert table_rows(model_card(report(measured=[bare])), "| pydoc")[0][3:6] == ["-", "-", "-"]


def test_no_measurement():
    card = model_card(report(measured=[]))
    assert "Nothing was measured" in card
    assert "| perplexity |" not in card


def test_worst_layers_first():
    rows = table_rows(model_card(report()), "| `model.layers")
    assert [row[0] for row in rows] == [f"`model.layers.{n}.mlp.up_proj`" for n in (8, 7, 6, 5, 4)]
    assert rows[0][1:] == ["3.25", "0.01", "0.08"]


def test_data_free_run():
    card = model_card(report("rtn", layers=[layer(0, None)], identity={"calibration": None}))
    assert "largest relative output error" not in card
    assert "No calibration text was used" in card


def test_calibration_text_named():
    card = model_card(report())
    assert "Calibrated on 128 windows of 512 tokens of\n`pydoc` (seed 3, sha256\n`0123456789abcdef`)" in card


def test_token_windows_digest():
    card = model_card(report(identity={"calibration": {"source": "tokens", "sha256": "f" * 64}}))
    assert "ffffffffffffffff" in card
    assert "Calibrated on  windows" not in card


@pytest.mark.parametrize("method", METHODS.names())
@pytest.mark.parametrize("measured", [[], [MEASURED], [MEASURED, {**MEASURED, "split": "all"}]])
@pytest.mark.parametrize("error", [None, 0.5])
def test_card_sections(method, measured, error):
    """Markdown takes the line after a table for one more row of it."""
    card = model_card(report(method, measured=measured, layers=[layer(0, error)]))
    assert card.endswith("```\n")
    assert "\n\n\n" not in card
    for part in card.split("\n\n"):
        starts = {line[:1] == "|" for line in part.splitlines()}
        assert len(starts) == 1, part
        assert "#" not in {line[:1] for line in part.splitlines()[1:]}, part


HEAD = {"format": "uniform", "bits": 8, "group_size": 64, "symmetric": False, "zero": "integer"}
SIZED = {
    "shape": [1, 1],
    "format": "uniform",
    "size_bytes": 3_000_000,
    "bits_per_weight": 8.375,
    "weight_error": 0.0,
}


@pytest.mark.parametrize("head", ["lm_head", ""])
@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_size(head, tied):
    ends = {"embedding": "model.embed_tokens", "head": head, "tied": tied}
    outside = [{**SIZED, "name": name} for name in (("model.embed_tokens", head)[: 2 - tied]) if name]
    sized = [{**layer(n, 0.1), "size_bytes": 1_000_000} for n in range(9)]
    recipe = {**build_recipe("gptq").to_dict(), "head": HEAD}
    sizes = {"head_bits_per_weight": 8.375, "ends": ends, "unquantized_bytes": 500_000}
    card = model_card(report(recipe=recipe, layers=outside + sized, **sizes))
    named = "oken embeddings and head" if head else "oken embeddings"
    total, both = (12.5, "3.00 MB") if len(outside) == 1 else (15.5, "6.00 MB")
    assert f"T{named} are stored packed too, in uniform (bits 8, group_size 64" in card
    assert (", one matrix for both" in card) == tied
    assert f"The tensors take {total} MB: 9.00 MB in the blocks' linear layers, {both} in t{named}, 500 kB" in card


def test_float_embedding_and_head():
    sized = [{**layer(n, 0.1), "size_bytes": 1_000_000} for n in range(9)]
    card = model_card(report(layers=sized, ends=None, head_bits_per_weight=None, unquantized_bytes=56_000_000))
    assert "Embeddings, norms and the head are as in the source." in card
    assert "The tensors take 65.0 MB: 9.00 MB in the blocks' linear layers, 56.0 MB in float." in card


def test_quantized_source_is_named():
    types = [
        {"type": "Q4_1", "bits_per_weight": 5.0, "share": 0.75},
        {"type": "F16", "bits_per_weight": 16.0, "share": 0.25},
    ]
    card = model_card(report(source_types=types))
    assert "The source is already quantized: it has 75.0% of its weights in Q4" in card
    assert "25.0% of its weights in F16 (16 bits)" in card
    assert "already quantized" not in model_card(report(source_types=[]))


def test_head_alone():
    head = {"lm_head": HEAD | {"bits": 6}}
    ends = {"embedding": "", "head": "lm_head", "tied": False}
    sized = [{**SIZED, "name": "lm_head"}, {**layer(1, 0.1), "size_bytes": 1_000_000}]
    card = model_card(
        report(layers=sized, ends=ends, head_formats=head, head_bits_per_weight=6.375, unquantized_bytes=1_000)
    )
    assert "Head is stored packed too, in uniform (bits 6" in card


def test_exceptions_listed():
    recipe = compose(build_recipe("gptq"), rules=["*.o_proj=float", "*.down_proj=uniform:bits=8"])
    card = model_card(report(recipe=recipe.to_dict()))
    assert "first match wins: `*.o_proj` float; `*.down_proj` uniform (bits 8, " in card
    assert "first match wins" not in model_card(report())


def test_answers_with_the_first_difference_in_bold():
    card = model_card(report(samples=sample_results.recorded_answers()))
    rows = table_rows(card, "| What")
    assert rows[0][1].startswith("The capital of France <b>is</b> Paris")
    assert rows[0][2:] == ["The capital of France <b>was</b> found<br>at \\*night\\*.…", "differs at token 5 of 8"]
    assert "## Answers" not in model_card(report())


def test_front_matter_of_the_hub():
    data = front_matter(model_card(report()))
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert "license" not in data
    published = {
        "id": "org/demo",
        "license": "other",
        "license_name": "own",
        "language": ["en"],
        "pipeline_tag": "x",
    }
    data = front_matter(model_card(report(published=published)))
    assert data["base_model"] == "org/demo"
    assert (data["license"], data["license_name"], data["language"]) == ("other", "own", ["en"])
    assert data["pipeline_tag"] == "text-generation"
    encoder = report(published=published, auto_class="AutoModel")
    assert front_matter(model_card(encoder))["pipeline_tag"] == "x"
    hub = {"id": "org/name", "revision": None, "commit": None}
    assert front_matter(model_card(report(hub=hub, published=published)))["base_model"] == "org/name"


def test_commands():
    card = model_card(report())
    assert "bitmill generate FOLDER" in card
    assert "bitmill generate" not in model_card(report(auto_class="AutoModel"))
    assert "](" not in card  # a link could be dead on a hub
