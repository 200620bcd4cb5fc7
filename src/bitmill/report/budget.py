"""A plan for a budget as text: the sensitivity of each kind of layer as bars, and what was chosen for it."""

from __future__ import annotations

from typing import Any

_BAR, _LEVELS = 16, "▁▂▃▄▅▆▇█"


def describe_budget(budget: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (name, value) rows of a plan.

    Args:
        budget: the entry `budget` of a summary or report.
    """
    rows = [
        (
            "budget",
            f"{budget['text']}: {budget['bits_per_weight']:.3f} bits per weight in the blocks, "
            f"{budget['size_bytes'] / 1e6:,.1f} MB of weights",
        )
    ]
    rows += _memory(budget) + _time(budget)
    label = _common_label(budget["kinds"])
    costs = [kind["costs"].get(label, 0.0) for kind in budget["kinds"]]
    largest = max(costs, default=0.0)
    for kind, cost in zip(budget["kinds"], costs):
        bar = "█" * round(_BAR * cost / largest) if largest > 0 else ""
        chosen = ", ".join(f"{chosen} in {count}" for chosen, count in kind["chosen"].items())
        measured = f"{cost:.2g}" if label in kind["costs"] else "-"
        rows.append(("", f"{bar:{_BAR}} {measured:>7}  {kind['name']}: {chosen}"))
    first = len(rows) - len(budget["kinds"])
    rows[first : first + 1] = [("sensitivity", rows[first][1])] if budget["kinds"] else []
    rows.append(("", f"bars are mean costs at {label}, by {budget['sensitivity']['sensitivity']}"))
    rows.append(("bits of blocks", _curve(budget["blocks"])))
    return [*rows, *_verified(budget), *(("note", f"{note}.") for note in budget.get("notes", []))]


def _memory(budget: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows about a process at a context; none for other budgets."""
    if "context" not in budget:
        return []
    parts = budget["memory"]
    largest = ", ".join(f"{name.replace('_', ' and ')} {size / 1e6:,.1f}" for name, size in parts.items())
    rows = [("memory", f"MB at {budget['context']:,} tokens: {largest}"), ("keys and values", budget["kv"])]
    if peak := budget.get("measured_peak_bytes"):
        rows.append(("measured peak", f"{peak / 1e6:,.1f} MB at that context"))
    return rows


def _time(budget: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the row about the time of linear layers; none for other budgets."""
    if "linear_time_s" not in budget:
        return []
    own, of_float = (1e3 * budget[key] for key in ("linear_time_s", "float_linear_time_s"))
    tokens = f"{budget['tokens']:,} token" + "s" * (budget["tokens"] > 1)
    return [
        ("linear layers", f"{own:,.3f} ms for {tokens} by their kernels on this machine, {of_float:,.3f} in float")
    ]


def budget_text(budget: dict[str, Any]) -> str:
    """Return the rows of a plan as lines of text."""
    return "\n".join(f"{name:15} {value}".rstrip() for name, value in describe_budget(budget))


def budget_sentence(budget: dict[str, Any]) -> str:
    """Return in one or two sentences how a recipe was found, for a model card."""
    plans = [plan for plan in budget.get("plans", []) if plan.get("measured_kl") is not None]
    measured = "; ".join(_plan(plan) for plan in plans)
    text = (
        f"The recipe was chosen for a budget of {budget['text']} by the sensitivity "
        f"{budget['sensitivity']['sensitivity']} and the allocator {budget['allocator']['allocator']}."
    )
    if not measured:
        return text
    reason = ", because it was the best of those measured" if len(plans) > 1 else ""
    windows = f"{budget['held_apart']} windows of {budget['seqlen']} tokens"
    return f"{text} On {windows} that did not calibrate: {measured}. Written is the {budget['written']}{reason}."


def _verified(budget: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of the plans that were measured."""
    plans = [plan for plan in budget.get("plans", []) if plan.get("measured_kl") is not None]
    if not plans:
        return [("predicted", f"KL divergence {budget['predicted_kl']:.4f} nats; not measured")]
    rows = [("verified" if number == 0 else "", _plan(plan)) for number, plan in enumerate(plans)]
    return [*rows, ("chosen", f"the {budget['written']}, on {budget['held_apart']} windows held apart")]


def _plan(plan: dict[str, Any]) -> str:
    return (
        f"{plan['name']} at {plan['bits_per_weight']:.3f} bits, KL divergence {plan['predicted_kl']:.4f} "
        f"predicted and {plan['measured_kl']:.4f} measured"
    )


def _common_label(kinds: list[dict[str, Any]]) -> str:
    """Return the candidate that is chosen most often, of those that most kinds have."""
    chosen: dict[str, int] = {}
    for kind in kinds:
        for label, count in kind["chosen"].items():
            if len(kind["costs"]) > 1:
                chosen[label] = chosen.get(label, 0) + (count if kind["costs"][label] > 0 else 0)
    return max(chosen, key=lambda label: chosen[label]) if chosen else ""


def _curve(bits: list[float]) -> str:
    """Return the bits of the blocks as a line of bars, with the least and the most."""
    least, most = min(bits), max(bits)
    span = most - least
    bars = "".join(
        _LEVELS[round((len(_LEVELS) - 1) * (b - least) / span)] if span > 0 else _LEVELS[3] for b in bits
    )
    return f"{bars}  {least:.2f} to {most:.2f}"
