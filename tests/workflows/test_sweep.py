"""A sweep of a model: its cells equal quantization, and its verdicts follow from them."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import bitmill
from bitmill.cli.sweep import cell_table
from bitmill.errors import UsageError
from bitmill.evaluation.figures import WindowSums
from bitmill.evaluation.metrics import score_windows
from bitmill.models.streamed import StreamedModel
from bitmill.progress import Progress
from bitmill.recipes.method import build_recipe
from bitmill.report.verdicts import BROKEN, LIMITS, VERDICTS, summarize, verdict
from bitmill.sources.open import open_source
from bitmill.workflows.sweep.cell import decibels
from bitmill.workflows.sweep.layers import Layers
from bitmill.workflows.sweep.run import fill_cells, sweep
from bitmill.workflows.sweep.weights import BITS, FLOATS, SIZES, WeightCell, weight_cells
from helpers.tiny_models import tiny_model

WINDOWS = torch.randint(3, 128, (3, 16), generator=torch.Generator().manual_seed(0))
architectures = pytest.mark.parametrize("architecture", ["llama", "gpt2"])


def quantized(model: torch.nn.Module, method: str, **options: object) -> tuple[torch.nn.Module, list[dict]]:
    """Return a quantized copy, and the layers of its report."""
    outcome = bitmill.quantize(copy.deepcopy(model), method, measure=0, **options)
    return outcome.model, outcome.report["layers"]


@architectures
def test_equals_quantization(architecture: str) -> None:
    model = tiny_model(architecture)
    result = sweep(model)
    assert len(result["cells"]) == len(BITS) * len(SIZES) + len(FLOATS)
    for cell in (result["cells"][1], result["cells"][14], result["cells"][-2]):
        options = {"bits": cell["bits"], "group_size": cell["group_size"]} if cell["method"] == "rtn" else {}
        layers = quantized(model, cell["method"], **options)[1]
        errors = {layer["name"]: layer["weight_error"] for layer in layers}
        assert cell["weight_error"] == pytest.approx(sum(errors.values()) / len(errors), rel=1e-6)
        assert cell["worst_layer"] == max(errors, key=lambda name: errors[name])
        assert cell["worst_sqnr_db"] == pytest.approx(decibels(max(errors.values())), rel=1e-6)
        size = sum(layer["size_bytes"] for layer in layers) * 8
        assert cell["bits_per_weight"] == pytest.approx(size / result["quantized_weights"])
        assert cell["perplexity"] is cell["kl_divergence"] is None


@architectures
def test_measures_quantized_model(architecture: str) -> None:
    model = tiny_model(architecture)
    table = [cell for cell in weight_cells(search=False) if cell.group_size == 32 and cell.bits in (3, 4)]
    streamed = StreamedModel(open_source(model))
    fill_cells(streamed, table, Layers(streamed), WINDOWS, Progress())
    for cell in table:
        core = cell.recipe.default.format.core
        options = {"bits": core.bits, "group_size": 32} if cell.recipe.name == "rtn" else {}
        with_codes, _ = quantized(model, cell.recipe.name, **options)
        logits = (lambda tokens, m=m: m(tokens).logits for m in (with_codes, model))
        expected = score_windows(next(logits), WINDOWS, next(logits))
        found = cell.result()
        for key in ("perplexity", "kl_divergence", "top1_agreement"):
            assert found[key] == pytest.approx(expected[key], rel=1e-3)


def test_model_unmodified() -> None:
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sweep(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_search_lowers_errors() -> None:
    plain, searched = sweep(tiny_model("llama")), sweep(tiny_model("llama"), search=True)
    for one, other in zip(plain["cells"], searched["cells"]):
        assert other["weight_error"] <= one["weight_error"] * (1 + 1e-6)
        assert other["bits_per_weight"] == one["bits_per_weight"]


def test_layer_ranking() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        weight = model.model.layers[1].mlp.down_proj.weight
        weight[:, ::16] *= 6  # a few columns stretch every range
    result = sweep(model)
    assert result["layers"][0]["name"] == "model.layers.1.mlp.down_proj"
    assert result["kinds"][0]["name"] == "mlp.down_proj"
    relative = [layer["relative_error"] for layer in result["layers"]]
    assert relative == sorted(relative, reverse=True)
    assert sum(relative) / len(relative) == pytest.approx(1)
    assert sum(kind["layers"] for kind in result["kinds"]) == len(relative) == 14


def cell(sqnr_db: float = 40.0, worst: float = 40.0, kl: float | None = None, **changes: object) -> dict:
    base = {"method": "rtn", "bits": 4, "group_size": 64, "bits_per_weight": 4.3}
    base["name"] = changes.get("method") or f"{changes.get('bits', 4)} bits"
    made = {**base, "sqnr_db": sqnr_db, "worst_sqnr_db": worst, "kl_divergence": kl, **changes}
    return {**made, "verdict": verdict(made)}


def test_verdict_from_divergence() -> None:
    for word, most, _ in LIMITS["weight"]:
        assert cell(0, 0, most)["verdict"] == word
        assert VERDICTS.index(cell(99, 99, most * 1.01)["verdict"]) == VERDICTS.index(word) + 1
    assert cell(99, 99, math.inf)["verdict"] == BROKEN


def test_verdict_from_errors() -> None:
    for word, _, least in LIMITS["weight"]:
        assert cell(least, least)["verdict"] == word
        assert VERDICTS.index(cell(least - 0.1, least)["verdict"]) == VERDICTS.index(word) + 1
        assert (
            VERDICTS.index(cell(least, least - 10.1)["verdict"]) == VERDICTS.index(word) + 1
        )  # one layer is far off
    assert cell(math.inf, math.inf)["verdict"] == "safe"


def test_verdict_words() -> None:
    lines = summarize(
        [
            cell(bits=8, group_size="row", bits_per_weight=8.1),
            cell(bits=8, group_size=64, bits_per_weight=8.4),
            cell(25, 25, bits=4, group_size="row", bits_per_weight=4.1),
            cell(25, 25, bits=4, group_size=128),
            cell(30, 30, bits=4, group_size=64, bits_per_weight=4.4),
            cell(15, 15, method="nf4"),
        ]
    )
    assert lines == [
        "8 bits: safe per row and in groups of 64",
        "4 bits: safe in groups of 64; fair per row and in groups of 128",
        "nf4 in groups of 64: poor",
        "smallest safe: 4 bits in groups of 64, 4.40 bits per weight",
        "smallest fair: 4 bits per row, 4.10 bits per weight",
    ]
    assert summarize([cell(0, 0)])[-2:] == ["smallest safe: none of these", "smallest fair: none of these"]


def test_unmeasurable_cell() -> None:
    made = WeightCell("4 bits", 4, 64, build_recipe("rtn"), errors={"a": 0.1}, stored_bits=4, numbers=1)
    made.metrics.windows.append(WindowSums(2, loss=math.nan, predicted=1))
    result = made.result()
    assert (result["perplexity"], result["kl_divergence"], result["top1_agreement"]) == (None, math.inf, None)
    assert cell_table([{**result, "verdict": verdict(result)}], measured=True).row_count == 1


def test_decibels() -> None:
    assert decibels(0.01) == pytest.approx(20)
    assert decibels(0) == math.inf


def test_no_windows_refused() -> None:
    with pytest.raises(UsageError, match="windows is 0"):
        sweep(tiny_model("llama"), windows=0)
