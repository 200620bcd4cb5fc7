"""Names, cards and options of registered members, read from their source: torch is not imported.

Listings and shell completion have to answer at once, and importing the modules of a registry takes seconds.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Listing:
    """A registered member.

    Attributes:
        name: the registered name.
        card: its docstring.
        options: name, type, default and help of every option; None where only an import can tell them.
    """

    name: str
    card: str
    options: list[dict[str, Any]] | None

    @property
    def summary(self) -> str:
        """The first line of the card."""
        return self.card.partition("\n")[0]


@cache
def listings(package: str) -> dict[str, Listing]:
    """Return the members that the modules of a package register, by name, sorted.

    Args:
        package: dotted name, such as "bitmill.recipes.methods".
    """
    folder = ROOT.joinpath(*package.split(".")[1:])
    found = [one for file in folder.glob("*.py") for one in _members(file.read_text(encoding="utf-8"))]
    return {one.name: one for one in sorted(found, key=lambda one: one.name)}


def _members(source: str) -> Iterator[Listing]:
    module = ast.parse(source)
    for node in module.body:
        if not isinstance(node, ast.ClassDef):
            continue
        for decorator in node.decorator_list:
            match decorator:
                case ast.Call(func=ast.Attribute(attr="register"), args=[ast.Constant(value=str(name))]):
                    card = inspect.cleandoc(ast.get_docstring(node) or "")
                    yield Listing(name, card, _options(node, module))


def _options(kind: ast.ClassDef, module: ast.Module) -> list[dict[str, Any]] | None:
    """Return the options of a class, those of its bases first; None where an expression is not a plain value."""
    options: dict[str, dict[str, Any]] = {}  # one of the class takes the place of a base's of its name
    for base in kind.bases:
        inherited = _options_of_base(base, module)
        if inherited is None:
            return None
        options |= {one["name"]: one for one in inherited}
    for node in kind.body:
        if not isinstance(node, ast.AnnAssign) or "ClassVar" in ast.unparse(node.annotation):
            continue
        match node:
            case ast.AnnAssign(
                target=ast.Name(id=name),
                value=ast.Call(func=ast.Name(id="option"), args=[default, ast.Constant(value=str(text))]),
            ):
                try:
                    value = ast.literal_eval(default)
                except ValueError:  # a name or a call
                    return None
                hint = ast.unparse(node.annotation)  # as Python itself writes postponed annotations
                options[name] = {"name": name, "type": hint, "default": value, "help": text}
            case _:
                return None
    return list(options.values())


def _options_of_base(base: ast.expr, module: ast.Module) -> list[dict[str, Any]] | None:
    """Return the options of a base class that a module imports from bitmill; None for other bases."""
    for node in module.body:
        match node:
            case ast.ImportFrom(module=str(home), names=names) if home.startswith("bitmill."):
                if isinstance(base, ast.Name) and base.id in {alias.name for alias in names}:
                    file = ROOT.joinpath(*home.split(".")[1:]).with_suffix(".py")
                    if not file.is_file():
                        return None
                    parsed = ast.parse(file.read_text(encoding="utf-8"))
                    kinds = (n for n in parsed.body if isinstance(n, ast.ClassDef) and n.name == base.id)
                    return next((_options(kind, parsed) for kind in kinds), None)
    return None
