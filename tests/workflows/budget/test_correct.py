"""Changes measured around a quantized model equal those of whole models with these weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bitmill.allocators import ALLOCATORS
from bitmill.models.streamed import StreamedModel
from bitmill.numerics.statistics import Statistics
from bitmill.progress import Progress
from bitmill.recipes.method import build_recipe
from bitmill.sensitivities import SENSITIVITIES
from bitmill.sensitivities.base import Run
from bitmill.sensitivities.candidate import Candidate
from bitmill.sensitivities.measure import measure_blocks
from bitmill.solvers.base import solve
from bitmill.sources.module import ModuleSource
from bitmill.workflows.budget.correct import _Around, corrected_plan
from bitmill.workflows.budget.plan import Plan, solve_plan
from bitmill.workflows.budget.problem import build_problem
from bitmill.workflows.budget.size import parse_budget
from helpers.tiny_models import tiny_model

WINDOWS = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def planned(tmp_path):
    """A run, its costs, and a plan of few bits."""
    streamed = StreamedModel(ModuleSource(tiny_model("llama")))
    methods = [build_recipe("rtn", {"bits": bits, "group_size": 16}) for bits in (2, 3, 8)]
    problem = build_problem(streamed, parse_budget("4.3bpw"), methods, (), None)
    run = Run(streamed, WINDOWS, tmp_path, Progress())
    sensitivity = SENSITIVITIES.get("output_error")()
    costs = measure_blocks(run, [sensitivity], problem.units, problem.candidates).costs["output_error"]
    return run, costs, solve_plan("plan", problem, costs, ALLOCATORS.get("integer_programme")())


def with_plan(model: nn.Module, chosen: dict[str, Candidate], plan: Plan) -> nn.Module:
    model = copy.deepcopy(model)
    for unit in plan.problem.units:
        for layer in unit.layers:
            linear, scheme = model.get_submodule(layer), chosen[unit.name].scheme
            if scheme is not None:
                quantized = solve(scheme.solver, linear.weight.data, Statistics(), scheme.format)
                linear.weight.data = quantized.dequantize()
    return model


@torch.no_grad()
def divergence(model: nn.Module, other: nn.Module) -> float:
    p, q = (m(WINDOWS[:2]).logits.log_softmax(-1) for m in (model, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_changes_equal_those_of_whole_models(planned, tmp_path):
    run, _, plan = planned
    around, model = _Around(run, plan.problem, plan, tmp_path, 2), tiny_model("llama")
    with torch.no_grad():
        around.quantize(Progress())
        neighbours = {unit.name: [plan.problem.candidates[unit.name][-1]] for unit in plan.problem.units}
        changed = around.measure(neighbours, Progress())  # each unit alone in float
    base = divergence(model, with_plan(model, plan.chosen, plan))
    for unit in (plan.problem.units[0], plan.problem.units[-1]):
        (other,) = neighbours[unit.name]
        whole = divergence(model, with_plan(model, {**plan.chosen, unit.name: other}, plan)) - base
        assert changed[unit.name][other.key] == pytest.approx(whole, abs=1e-5)
        assert changed[unit.name][plan.chosen[unit.name].key] == 0


def test_corrected_plan_moves_to_neighbours_within_the_budget(planned):
    run, costs, plan = planned
    allocator = ALLOCATORS.get("integer_programme")()
    better = corrected_plan(run, plan.problem, plan, costs, allocator)
    assert better.bits_per_weight <= 4.3
    for unit in plan.problem.units:
        order = plan.problem.candidates[unit.name]
        assert abs(order.index(better.chosen[unit.name]) - order.index(plan.chosen[unit.name])) <= 1
    matrix = run.streamed.model.get_parameter(f"{plan.problem.units[0].layers[0]}.weight")
    assert matrix.is_meta  # all blocks were freed
