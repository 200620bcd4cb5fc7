"""Sensitivities and plans for budgets on SmolLM2: rank correlations, seconds, predicted and measured divergence.

    OMP_NUM_THREADS=1 python benchmarks/budget.py sensitivities
    OMP_NUM_THREADS=1 python benchmarks/budget.py plans --budgets 2.5,3.0 --sensitivities noise --corrections 0
    OMP_NUM_THREADS=1 python benchmarks/budget.py singles --labels "quip 3-bit"

Text is the calibration part of pydoc alone, in windows of SEQLEN tokens, of which the last eighth is held apart.
Everything measured is kept in --folder, so that an interrupted run goes on. Results go to benchmarks/results/.
Plans and single recipes on the suite, for the budgets of a whole frontier, are `benchmarks/budget_suite.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

from bitmill.calibration.token_windows import JobData, token_windows
from bitmill.config.parsing import parse_part
from bitmill.data.held_apart import hold_apart
from bitmill.data.windows import CalibrationData
from bitmill.files import write_json
from bitmill.models.streamed import StreamedModel
from bitmill.progress import Progress
from bitmill.recipes.compose import find_recipe
from bitmill.recipes.recipe import Recipe
from bitmill.sensitivities import SENSITIVITIES
from bitmill.sensitivities.base import Run
from bitmill.sensitivities.candidate import Candidate, block_units
from bitmill.sensitivities.measure import measure_blocks
from bitmill.sensitivities.store import Costs
from bitmill.sources.open import open_source
from bitmill.workflows.budget.candidates import block_candidates
from bitmill.workflows.budget.plan import Plan
from bitmill.workflows.budget.problem import build_problem
from bitmill.workflows.budget.run import BudgetRequest, held_apart_windows, recipe_for_budget
from bitmill.workflows.budget.size import parse_budget
from bitmill.workflows.budget.verify import Verifier
from bitmill.workflows.prepare import QuantizeRequest

MODEL, TEXT, SAMPLES, SEQLEN = "smollm2-135m", "pydoc", 16, 256
CANDIDATES = (
    ("gptq", {"bits": 2}),
    ("gptq", {"bits": 2, "group_size": 40}),  # 2.45 bits, a single recipe near 2.5
    ("quip", {"bits": 3}),  # 3.0 bits, a single recipe at 3.0
    ("gptq", {"bits": 3}),
    ("gptq", {"bits": 4}),
)
EVERY = 3  # all sensitivities are compared in every third block
SENSITIVITY_PARTS = {  # one window, or four for those of gradients
    "kl": "kl:windows=1,tokens=128",
    "noise": "noise:windows=1,tokens=128",
    "higgs": "higgs:windows=1,tokens=128",
    "output_error": "output_error",
    "hutchinson": "hutchinson:windows=4",
    "fisher": "fisher:windows=4",
    "taylor": "taylor:windows=4",
}
RESULTS = Path(__file__).parent / "results" / "budget.json"
CALIBRATION = CalibrationData(TEXT, SAMPLES, SEQLEN, 0)


class PrintedProgress(Progress):
    """Prints tasks, and the time every tenth step."""

    def start(self, task: str, total: int) -> None:
        self._task, self._done = task, 0
        print(time.strftime("%H:%M:%S"), task, total, flush=True)

    def advance(self, steps: int = 1) -> None:
        self._done += steps
        if self._done % 10 == 0:
            print(time.strftime("%H:%M:%S"), self._task, self._done, flush=True)

    def note(self, sentence: str) -> None:
        print(sentence, flush=True)


def recipes() -> list[Recipe]:
    """Return the candidates."""
    made = []
    for method, options in CANDIDATES:
        recipe = find_recipe(method, options)
        made.append(replace(recipe, name="-".join([method, *(f"g{options[k]}" for k in options if k != "bits")])))
    return made


def sensitivities(folder: Path) -> dict[str, Any]:
    """Measure all sensitivities in one walk, and compare each with the divergence of single units."""
    streamed = StreamedModel(open_source(MODEL))
    data = token_windows(streamed.source, CALIBRATION, True, 0)
    assert data.windows is not None
    kept, _ = hold_apart(data.windows, held_apart_windows(len(data.windows)))
    parts = [SENSITIVITIES.from_dict(parse_part(SENSITIVITIES, part)) for part in SENSITIVITY_PARTS.values()]
    units = [unit for unit in block_units(streamed) if unit.block % EVERY == 1]
    candidates = block_candidates(recipes())
    run = Run(streamed, kept, folder, PrintedProgress())
    began = time.process_time()
    found = measure_blocks(run, parts, units, {unit.name: candidates for unit in units})
    table: dict[str, Any] = {}
    for name, costs in found.costs.items():
        row: dict[str, Any] = {"cpu_seconds": found.cpu_seconds[name]}
        for candidate in candidates:
            if candidate.scheme is not None:
                row[candidate.label] = rank_correlation(costs, found.costs["kl"], [candidate])
        row["all"] = rank_correlation(costs, found.costs["kl"], [c for c in candidates if c.scheme])
        table[name] = row
    return {
        "windows": len(kept),
        "blocks": len({unit.block for unit in units}),
        "units": len(units),
        "solve_cpu_seconds": found.solve_cpu_seconds,
        "cpu_seconds": time.process_time() - began,
        "sensitivities": SENSITIVITY_PARTS,
        "rank_correlations": table,
    }


def rank_correlation(costs: Costs, others: Costs, candidates: list[Candidate]) -> float:
    """Return Spearman's correlation of two costs over units and candidates."""
    pairs = [(costs[unit][c.key], others[unit][c.key]) for unit in costs for c in candidates]
    return float(spearmanr(*zip(*pairs)).statistic)


def plans(folder: Path, budgets: list[str], names: list[str], corrections: int) -> list[dict[str, Any]]:
    """Solve and verify a plan for every budget and sensitivity; the best uniform recipes are measured with it."""
    rows = []
    for budget in budgets:
        for name in names:
            request = QuantizeRequest(
                MODEL, Path("unused"), CALIBRATION, 0, "cpu", True, False, False, "float", folder, None, None,
                False, PrintedProgress(),
            )  # fmt: skip
            asked = BudgetRequest(
                f"{budget}bpw", recipes(), SENSITIVITY_PARTS[name], max_minutes=1e6, corrections=corrections
            )
            summary = recipe_for_budget(request, asked, (), None).summary
            rows.append({"budget": float(budget), "of": name, **summary})
            for plan in summary["plans"]:
                print(json.dumps(plan), flush=True)
    return rows


def singles(folder: Path, labels: list[str]) -> list[dict[str, Any]]:
    """Measure single recipes, by the labels of their candidates, on the windows that verify plans."""
    streamed = StreamedModel(open_source(MODEL))
    data = token_windows(streamed.source, CALIBRATION, True, 0)
    assert data.windows is not None
    kept, apart = hold_apart(data.windows, held_apart_windows(len(data.windows)))
    problem = build_problem(streamed, parse_budget("15bpw"), recipes(), (), None)
    verifier = Verifier(streamed, JobData(kept, list(apart)), "float", folder, PrintedProgress())
    for candidate in block_candidates(recipes()):
        if candidate.label in labels:
            verifier.measure(Plan(candidate.label, problem, {u.name: candidate for u in problem.units}, 0.0))
    return [{key: value for key, value in row.items() if key != "predicted_kl"} for row in verifier.measured]


def main() -> None:
    """Measure, and add the result to the file of results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["sensitivities", "plans", "singles"])
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache" / "bitmill" / "benchmark-budget")
    parser.add_argument("--budgets", default="2.5,3.0")
    parser.add_argument("--sensitivities", default="noise")
    parser.add_argument("--labels", default="quip 3-bit")
    parser.add_argument("--corrections", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.what == "sensitivities":
        found: Any = sensitivities(arguments.folder)
    elif arguments.what == "singles":
        found = singles(arguments.folder, arguments.labels.split(","))
    else:
        budgets, names = arguments.budgets.split(","), arguments.sensitivities.split(",")
        found = plans(arguments.folder, budgets, names, arguments.corrections)
        known = recorded()
        new = {(row["budget"], row["of"]) for row in found}
        found = [row for row in known.get("plans", []) if (row["budget"], row["of"]) not in new] + found
    about = {
        "model": MODEL,
        "text": TEXT,
        "samples": SAMPLES,
        "seqlen": SEQLEN,
        "threads": torch.get_num_threads(),
    }
    write_json(RESULTS, finite({**recorded(), **about, arguments.what: found}))


def recorded() -> dict[str, Any]:
    """Return what the file of results holds now."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def finite(value: Any) -> Any:
    """Return plain data with null for infinities."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
