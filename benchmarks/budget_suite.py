"""Plans for budgets and the single recipes of their sizes, measured on the suite: the frontier of a model.

    python benchmarks/budget_suite.py smollm2-135m --list     # single recipes and their bits, in seconds
    python benchmarks/budget_suite.py smollm2-135m            # all budgets and recipes, for an idle machine
    python benchmarks/budget_suite.py gemma-3-270m --budgets 2.5bpw,130MB --methods gptq,pvq
    python benchmarks/budget_suite.py smollm2-135m --budgets "800MB at 8k context"
    python benchmarks/budget_suite.py smollm2-135m --budgets 3.0bpw --singles gptq-3-g128,pvq-3 --max-minutes 60

Everything is kept: statistics, sensitivities and verified plans, every folder, every row of figures. The same
command goes on after an interruption, in the middle of a folder too; --max-minutes interrupts it. Calibration is
128 windows of 512 tokens of the mixture for all of them, of which plans hold 16 apart, with the float model's
statistics. Figures go to results/budget-suite-MODEL.json by `benchmarks/suite.py`, seconds of every folder to
seconds.json next to it.
"""

from __future__ import annotations

import argparse
import json
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from suite import RESULTS, measure

import bitmill
from bitmill.errors import RecipeError
from bitmill.files import write_json
from bitmill.models.streamed import StreamedModel
from bitmill.recipes.compose import compose, find_recipe
from bitmill.recipes.recipe import Recipe
from bitmill.recipes.resolve import resolve_recipe
from bitmill.sources.open import open_source
from bitmill.workflows.sizes import storage_plan

BUDGETS = "2.0bpw,2.3bpw,2.5bpw,3.0bpw,3.5bpw,4.0bpw"
NEAR = 0.03  # bits per weight between a single recipe and a budget
GROUPS = (16, 24, 32, 40, 48, 64, 96, 128, 192, "row")
SHARES = (0.002, 0.005, 0.01)  # of sparse entries
CALIBRATION = bitmill.CalibrationData("mix", 128, 512, 0)


def recipes() -> Iterator[tuple[str, Recipe]]:
    """Yield the single recipes: methods by bits, size of groups and share of sparse entries."""
    for method in ("gptq", "gptqt", "pvq", "quip", "quip_sharp", "aqlm"):
        for bits in (2, 3, 4):
            for group in GROUPS if method in ("gptq", "gptqt") else (None,):
                options = {"bits": bits} | ({} if group is None else {"group_size": group})
                try:
                    base = find_recipe(method, options)
                    name = "-".join([method, str(bits), *([] if group is None else [f"g{group}"])])
                    yield name, base
                    for share in SHARES if method == "gptq" else ():
                        yield f"{name}-s{share}", compose(base, sparse=share)
                except RecipeError:  # the method does not have these options
                    continue


def near_budgets(model: str, budgets: Sequence[str]) -> dict[str, tuple[Recipe, float]]:
    """Return name -> single recipe and its bits per weight, of those within NEAR of a budget."""
    streamed = StreamedModel(open_source(model))
    wanted = [float(budget.removesuffix("bpw")) for budget in budgets if budget.endswith("bpw")]
    found = {}
    for name, recipe in recipes():
        bits = storage_plan(streamed, resolve_recipe(recipe, streamed))["bits_per_weight"]
        if any(abs(bits - budget) <= NEAR for budget in wanted):
            found[name] = recipe, bits
    return found


def make(out: Path, seconds: Path, model: str, method: Any, **options: Any) -> None:
    """Write a folder, unless it is complete, and add the seconds it took to a file."""
    if (out / "report.json").exists():
        return
    began = time.perf_counter()
    outcome = bitmill.quantize(
        model, method, out=out, calib=CALIBRATION, propagate="float", resume=True, measure=0, **options
    )
    known = json.loads(seconds.read_text()) if seconds.exists() else {}
    known[out.name] = {"seconds": time.perf_counter() - began, "budget": outcome.summary.get("budget")}
    write_json(seconds, known)
    print(outcome, flush=True)


def stop_after(minutes: float) -> None:
    """Interrupt this process after some minutes, as Ctrl-C does."""

    def interrupt(*given: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--budgets", default=BUDGETS, help="separated by commas (default: %(default)s)")
    parser.add_argument("--methods", help="to choose from in plans (default: gptq,pvq,quip_sharp)")
    parser.add_argument("--singles", help="names of single recipes, or none (default: all that --list shows)")
    parser.add_argument("--windows", type=int, default=40, help="of each domain (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=Path.home() / ".cache" / "bitmill" / "benchmark-budget-suite"
    )
    parser.add_argument("--list", action="store_true", help="print the single recipes and their bits alone")
    parser.add_argument("--max-minutes", type=float, help="stop then; the same command goes on")
    arguments = parser.parse_args()
    if arguments.max_minutes is None:
        run(arguments)
        return
    stop_after(arguments.max_minutes)
    try:
        run(arguments)
    except KeyboardInterrupt:
        print(f"stopped after {arguments.max_minutes:g} minutes; the same command goes on", flush=True)


def run(arguments: argparse.Namespace) -> None:
    """Make the folders and measure them."""
    budgets = arguments.budgets.split(",")
    singles = {} if arguments.singles == "none" else near_budgets(arguments.model, budgets)
    if arguments.singles not in (None, "none"):
        singles = {name: singles[name] for name in arguments.singles.split(",")}
    for name, (_, bits) in singles.items():
        print(f"{name:20} {bits:.3f}", flush=True)
    if arguments.list:
        return
    folder = arguments.folder / Path(arguments.model).name
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, (recipe, _) in singles.items():
        made.append(folder / name)
        make(made[-1], folder / "seconds.json", arguments.model, recipe, statistics=folder / "statistics")
    for budget in budgets:
        made.append(folder / f"budget-{budget.replace(' ', '-')}")
        chosen: dict[str, Any] = {} if arguments.methods is None else {"methods": arguments.methods.split(",")}
        planning = folder / "planning"  # statistics of the windows that are not held apart
        make(
            made[-1], folder / "seconds.json", arguments.model, None, budget=budget, statistics=planning, **chosen
        )
    out = RESULTS / f"budget-suite-{Path(arguments.model).name}.json"
    measure(arguments.model, made, ["suite"], arguments.windows, 512, out)


if __name__ == "__main__":
    main()
