"""Experts that no token was sent to have a stage, and the statistics of their layer."""

from __future__ import annotations

import torch

from bitmill.calibration.experts import fill_idle_experts, pooled, shrink, shrink_all, with_all_experts
from bitmill.numerics.statistics import Statistics

UP, DOWN = "mlp.experts.up", "mlp.experts.down"
LINEARS = ["q", *(f"{fused}.expert{n}" for fused in (UP, DOWN) for n in range(3)), "shared"]


def test_one_expert_after_another():
    seen = [["q"], [f"{UP}.expert0"], [f"{DOWN}.expert0"], [f"{UP}.expert2"], [f"{DOWN}.expert2"], ["shared"]]
    experts = [[f"{fused}.expert{n}"] for n in range(3) for fused in (UP, DOWN)]
    assert with_all_experts(seen, LINEARS) == [["q"], *experts, ["shared"]]


def test_one_matrix_after_another():
    seen = [["q"], [f"{UP}.expert0"], [f"{UP}.expert2"], [f"{DOWN}.expert0"], [f"{DOWN}.expert2"], ["shared"]]
    experts = [[f"{fused}.expert{n}"] for fused in (UP, DOWN) for n in range(3)]
    assert with_all_experts(seen, LINEARS) == [["q"], *experts, ["shared"]]


def test_no_experts():
    assert with_all_experts([["q", "k"], ["o"]], ["q", "k", "o"]) == [["q", "k"], ["o"]]


def test_shrunk_by_the_number_of_tokens():
    own = Statistics(2 * torch.eye(4), 4, mean_abs=torch.ones(4), max_abs=torch.ones(4))
    average = Statistics(torch.eye(4), 40, mean_abs=torch.full((4,), 2.0), max_abs=torch.full((4,), 3.0))
    shrunk = shrink(own, average)  # as many tokens as columns: half of each
    assert torch.allclose(shrunk.gram, 1.5 * torch.eye(4))
    assert shrunk.tokens == 4
    assert torch.equal(shrunk.mean_abs, torch.full((4,), 1.5))
    assert float(shrunk.max_abs[0]) == 3.0


def test_starved_expert_has_the_average():
    grams = [torch.eye(2), 4 * torch.eye(2)]
    stats = {f"{UP}.expert{n}": Statistics(gram, n * 2 + 1) for n, gram in enumerate(grams)}
    stats |= {f"{UP}.expert2": Statistics(), "q": Statistics(torch.eye(2), 9)}
    shrunk = shrink_all(stats)
    average = (grams[0] + 3 * grams[1]) / 4
    assert torch.allclose(shrunk[f"{UP}.expert2"].gram, average)
    assert shrunk[f"{UP}.expert2"].tokens == 0
    assert shrunk["q"] is stats["q"]
    assert pooled([Statistics()]) is None


def test_idle_experts_have_the_mean_fisher():
    known = {f"{UP}.expert{n}": torch.full((1, 2), float(n)) for n in range(3)}
    filled = fill_idle_experts({**known, "q": torch.zeros(1, 2)})
    assert torch.equal(filled[f"{UP}.expert0"], torch.full((1, 2), 1.5))
    assert torch.equal(filled[f"{UP}.expert2"], known[f"{UP}.expert2"])
    assert not filled["q"].any()
