"""Laws of sensitivities, for every registered sensitivity."""

from __future__ import annotations

import json
import math

import pytest
import torch

from bitmill.models.embedding_and_head import embedding_and_head
from bitmill.models.streamed import StreamedModel
from bitmill.pipeline.embeddings import round_to_nearest
from bitmill.progress import Progress
from bitmill.recipes.method import build_recipe
from bitmill.sensitivities import SENSITIVITIES
from bitmill.sensitivities import measure as module
from bitmill.sensitivities.base import Change, LoadedBlock, Run
from bitmill.sensitivities.candidate import Candidate, Unit, block_units
from bitmill.sensitivities.ends import measure_ends
from bitmill.sensitivities.measure import complete_costs, measure_blocks
from bitmill.sources.module import ModuleSource
from bitmill.workflows.budget.candidates import head_candidates
from helpers.tiny_models import tiny_model

WINDOWS = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(7))
every_sensitivity = pytest.mark.parametrize("name", SENSITIVITIES.names())


def candidate(bits: int, method: str = "rtn") -> Candidate:
    return Candidate(f"{method} {bits}", build_recipe(method, {"bits": bits, "group_size": 16}).default)


def run_of(folder, name: str = "llama") -> Run:
    return Run(StreamedModel(ModuleSource(tiny_model(name))), WINDOWS, folder, Progress())


def measured(run: Run, names: list[str], candidates: list[Candidate], **limits):
    units = block_units(run.streamed)
    by_unit = {unit.name: candidates for unit in units}
    return measure_blocks(run, [SENSITIVITIES.get(name)() for name in names], units, by_unit, **limits)


@every_sensitivity
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_costs(name, model, tmp_path):
    candidates = [candidate(2), candidate(8)]
    run = run_of(tmp_path / "one", model)
    found = measured(run, [name], candidates).costs[name]
    assert set(found) == {unit.name for unit in block_units(run.streamed)}
    for costs in found.values():
        assert all(math.isfinite(cost) and cost >= 0 for cost in costs.values())
    totals = [sum(costs[c.key] for costs in found.values()) for c in candidates]
    assert totals[0] > 2 * totals[1]
    again = measured(run_of(tmp_path / "two", model), [name], candidates).costs[name]
    assert again == found


@every_sensitivity
def test_unchanged_weights_cost_nothing_and_skipped_blocks_change_nothing(name, tmp_path):
    run = run_of(tmp_path)
    with torch.no_grad():
        alone, both = [costs_of_blocks(run, name, skip) for skip in (True, False)]
    assert both[0][0] == pytest.approx(0, abs=1e-7)
    assert alone[1] == pytest.approx(both[1], rel=1e-6)


def costs_of_blocks(run: Run, name: str, skip_first: bool) -> list[list[float]]:
    """The cost of no change and of a change in each block, but for the first one if it is skipped."""
    meter, path, costs = SENSITIVITIES.get(name)().begin(run), "mlp.down_proj", []
    for index in range(2):
        module_ = run.streamed.load_block(index)
        W = module_.get_submodule(path).weight.data
        gram = torch.eye(W.shape[1]) + 0.1
        block = LoadedBlock(index, module_, {path: module.Statistics(gram, 1)})
        for other in [] if skip_first and index == 0 else [W.clone(), W + 0.1]:
            meter.add(block, Change({path: other}, {path: W.clone()}))
        costs.append(meter.finish(block))
        run.streamed.free_block(index)
    return costs


@every_sensitivity
def test_round_trip(name):
    sensitivity = SENSITIVITIES.get(name)()
    assert SENSITIVITIES.from_dict(json.loads(json.dumps(sensitivity.to_dict()))) == sensitivity


def test_fused_layers_are_one_unit():
    units = block_units(run_of(None).streamed)
    names = [unit.name.removeprefix("model.layers.0.") for unit in units if unit.block == 0]
    assert names == [
        "self_attn.q_proj+k_proj+v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj+up_proj",
        "mlp.down_proj",
    ]


def test_interrupted_measurement_goes_on(tmp_path, monkeypatch):
    candidates, names = [candidate(2, "gptq"), candidate(4, "gptq")], ["kl", "output_error"]
    whole = measured(run_of(tmp_path / "whole"), names, candidates).costs
    walk_block = module._Walk.block

    def interrupted(self, index, *rest):
        if index == 1:
            raise KeyboardInterrupt
        walk_block(self, index, *rest)

    monkeypatch.setattr(module._Walk, "block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measured(run_of(tmp_path / "part"), names, candidates)
    monkeypatch.setattr(module._Walk, "block", walk_block)
    solved = []
    solve = module.solve_unit
    monkeypatch.setattr(module, "solve_unit", lambda *given: solved.append(given) or solve(*given))
    assert measured(run_of(tmp_path / "part"), names, candidates).costs == whole
    assert len(solved) == 8  # those of the second block
    monkeypatch.setattr(module, "solve_unit", None)
    assert measured(run_of(tmp_path / "part"), names, candidates).costs == whole


def test_little_time_is_a_sample(tmp_path):
    candidates = [candidate(bits) for bits in (2, 3, 4, 8)]
    run = run_of(tmp_path)
    found = measured(run, ["output_error"], candidates, max_seconds=0.0)
    assert found.skipped == 3 * 4  # all but one of every unit of the second block
    by_unit = {unit.name: candidates for unit in block_units(run.streamed)}
    for unit, costs in complete_costs(found.costs["output_error"], by_unit).items():
        assert [costs[c.key] for c in candidates] == sorted((costs[c.key] for c in candidates), reverse=True), unit


@pytest.mark.parametrize("model", ["llama", "gpt2"])  # with a head of its own, and a tied one
def test_embedding_and_head(model, tmp_path):
    run = run_of(tmp_path, model)
    ends = embedding_and_head(run.streamed)
    units = [Unit((layer,), -1) for layer in ends.layers]
    rounded = head_candidates()[0]
    found, _ = measure_ends(run, ends, units, {unit.name: [rounded] for unit in units})
    for unit in units:
        other = tiny_model(model)
        layer = other.get_submodule(unit.name)
        layer.weight.data = round_to_nearest(rounded.format, layer.weight.data).quantized.dequantize()
        with torch.no_grad():
            p, q = (m(WINDOWS).logits.log_softmax(-1) for m in (tiny_model(model), other))
        assert found[unit.name][rounded.key] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-5)
    assert measure_ends(run, ends, units, {unit.name: [rounded] for unit in units})[0] == found
