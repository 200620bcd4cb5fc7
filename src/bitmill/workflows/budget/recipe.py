"""A plan as a recipe: a default scheme, a rule for each kind of unit, and exceptions for single units."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields, replace
from typing import Any

import yaml

from bitmill.config.registry import Member
from bitmill.formats import Format
from bitmill.recipes.inputs import FLOAT
from bitmill.recipes.recipe import Recipe
from bitmill.recipes.rules import Rule
from bitmill.sensitivities.candidate import Candidate, Unit
from bitmill.workflows.budget.keys_values import written_kv
from bitmill.workflows.budget.problem import Problem


def plan_recipe(problem: Problem, chosen: dict[str, Candidate]) -> Recipe:
    """Return the recipe that gives every unit its candidate.

    The rules of the user come first, then exceptions by name, then patterns of all units of a kind; the default
    is the scheme of most weights, without rounded inputs.

    Args:
        problem: the problem.
        chosen: name of a unit -> its candidate.
    """
    streamed, blocks = problem.streamed, problem.streamed.adapter.blocks
    sizes = {site.layer: site.shape[0] * site.shape[1] for site in streamed.all_sites()}
    kinds: dict[tuple[str, ...], list[Unit]] = {}
    weighed: Counter[Candidate] = Counter()
    for unit in problem.block_units:
        if unit.name in problem.pinned:
            continue
        prefix = f"{streamed.block_name(unit.block)}."
        kinds.setdefault(tuple(layer.removeprefix(prefix) for layer in unit.layers), []).append(unit)
        scheme = chosen[unit.name].scheme
        if scheme is not None and scheme.inputs is None:  # the user's rules must not take inputs from the default
            weighed[chosen[unit.name]] += sum(sizes[layer] for layer in unit.layers)
    default = weighed.most_common(1)[0][0] if weighed else None
    exceptions, patterns = list[tuple[int, Rule]](), list[Rule]()
    for paths, units in kinds.items():
        usual = Counter(chosen[unit.name] for unit in units).most_common(1)[0][0]
        for unit in units:
            if chosen[unit.name] != usual:
                exceptions += [(unit.block, rule) for rule in _rules(unit.layers, chosen[unit.name])]
        if usual != default:
            patterns += _rules([f"{blocks}.*.{path}" for path in paths], usual)
    ordered = [rule for _, rule in sorted(exceptions, key=lambda exception: exception[0])]
    head, head_rules = _head(problem, chosen)
    recipe = replace(
        problem.base,
        rules=(*problem.base.rules, *ordered, *patterns, *head_rules),
        head=head,
        kv=_keys_values(problem, chosen),
    )
    if default is None or default.scheme is None:
        return recipe
    scheme = default.scheme
    return replace(recipe, weight=scheme.weight, solver=scheme.solver, transforms=scheme.transforms)


def readable_yaml(recipe: Recipe, comment: str) -> str:
    """Return a recipe as YAML with one line for each rule, without options that have their defaults.

    Args:
        recipe: the recipe.
        comment: lines to put before it.
    """
    data = recipe.to_dict()
    data |= {"weight": _short(recipe.weight), "solver": _short(recipe.solver)}
    data["transforms"] = [_short(transform) for transform in recipe.transforms]
    if isinstance(recipe.head, Format):
        data["head"] = _short(recipe.head)
    rules = data.pop("rules", [])
    head = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=1000)
    lines = [f"# {line}" for line in comment.splitlines()] + [head.rstrip("\n")]
    if rules:
        members = recipe.rules[len(recipe.rules) - len(rules) :]
        lines.append("rules: # the first pattern that matches a layer decides")
        lines += [
            "- " + yaml.safe_dump(_rule_dict(rule), sort_keys=False, default_flow_style=True, width=1000).strip()
            for rule in members
        ]
    return "\n".join(lines) + "\n"


def _rule_dict(rule: Rule) -> dict[str, Any]:
    data = rule.to_dict()
    if isinstance(rule.weight, Format):
        data["weight"] = _short(rule.weight)
    if rule.solver is not None:
        data["solver"] = _short(rule.solver)
    if rule.transforms is not None:
        data["transforms"] = [_short(transform) for transform in rule.transforms]
    return data


def _short(member: Member) -> dict[str, Any]:
    """Return a member as plain data without the options that have their defaults."""
    data = member.to_dict()
    for option in fields(member):  # type: ignore[arg-type]
        value = getattr(member, option.name)
        if option.default is not MISSING and value == option.default:
            data.pop(option.name, None)  # some members leave such options out themselves
        elif isinstance(value, Member):
            data[option.name] = _short(value)
    return data


def _rules(sites: Sequence[str], candidate: Candidate) -> Iterator[Rule]:
    """Yield rules for layers: one for names that differ in one character, otherwise one for each name."""
    scheme = candidate.scheme
    for pattern in _patterns(sites):
        if scheme is None:
            yield Rule(pattern, FLOAT)
        else:
            yield Rule(pattern, scheme.weight, scheme.solver, scheme.transforms, scheme.inputs)


def _patterns(names: Sequence[str]) -> list[str]:
    """Return one pattern for names that differ in one character, such as `[qkv]_proj`; otherwise the names."""
    if len(names) > 1 and len({len(name) for name in names}) == 1:
        differing = [at for at, characters in enumerate(zip(*names)) if len(set(characters)) > 1]
        if len(differing) == 1:
            at = differing[0]
            return [f"{names[0][:at]}[{''.join(name[at] for name in names)}]{names[0][at + 1 :]}"]
    return list(names)


def _keys_values(problem: Problem, chosen: dict[str, Candidate]) -> str | None:
    """Return the KV method of a plan with its options; None where keys and values are not in the budget."""
    pairs = [chosen[unit.name].pair for unit in problem.kv_units]
    return written_kv(problem.kv_base, [pair for pair in pairs if pair]) if pairs else None


def _head(problem: Problem, chosen: dict[str, Candidate]) -> tuple[Any, list[Rule]]:
    """Return the format of embedding and head, and rules for one that differs.

    Where files do not count, it is that of the base.
    """
    units = [unit for unit in problem.end_units if unit.name not in problem.pinned]
    if not units:
        return problem.base.head, []
    formats: list[Any] = [chosen[unit.name].format or FLOAT for unit in units]
    rules = [Rule(unit.layers[0], format) for unit, format in zip(units, formats) if format != formats[0]]
    return formats[0], rules
