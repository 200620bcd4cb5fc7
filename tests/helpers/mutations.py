"""Syntactic mutations of Python files."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

COMPARISONS = {
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


@dataclass
class Mutant:
    """One broken line.

    start, end: the replaced bytes of the file; status: noticed, survived, uncovered, or empty before the run.
    """

    area: str
    file: str
    line: int
    function: str
    change: str
    start: int
    end: int
    text: str
    status: str = ""
    tests: int = 0
    by: str = ""
    seconds: float = 0.0


def replacements(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST | str, str]]:
    """Yield (node to replace, its replacement, a description) for each mutation of a node."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        changed = ast.Compare(node.left, [COMPARISONS[type(node.ops[0])](), *node.ops[1:]], node.comparators)
        yield node, changed, "comparison flipped"
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield node, ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right), "operator swapped"
    elif isinstance(node, ast.BoolOp):
        yield node, ast.BoolOp(OPERATORS[type(node.op)](), node.values), "operator swapped"
    elif isinstance(node, ast.AugAssign) and type(node.op) in OPERATORS:
        yield node, ast.AugAssign(node.target, OPERATORS[type(node.op)](), node.value), "operator swapped"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node, node.operand, "sign or negation dropped"
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield node, ast.Constant(not node.value), "constant changed"
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield node, ast.Constant(node.value + 1), "constant changed"
        yield node, ast.Constant(node.value - 1), "constant changed"
    elif isinstance(node, ast.Constant) and isinstance(node.value, float):
        yield node, ast.Constant(node.value * 2 + 1), "constant changed"
    elif isinstance(node, ast.If | ast.While | ast.IfExp):
        yield node.test, ast.UnaryOp(ast.Not(), node.test), "condition negated"
    elif isinstance(node, ast.Raise) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield node, "pass", "statement dropped"


def nodes_in_code(tree: ast.Module) -> Iterator[tuple[ast.AST, str, bool]]:
    """Yield the nodes of a module but for annotations, their function, and whether they run in it."""

    def walk(node: ast.AST, scope: str, inside: bool) -> Iterator[tuple[ast.AST, str, bool]]:
        children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            scope = f"{scope}.{node.name}".strip(".")
            children = list(node.body)
        elif isinstance(node, ast.AnnAssign):
            children = [node.value] if node.value else []
        elif isinstance(node, ast.JoinedStr):
            children = []  # Python 3.11 gives no positions inside of them
        yield node, scope, inside
        inside = isinstance(node, ast.FunctionDef) or (inside and not isinstance(node, ast.ClassDef))
        for child in children:
            yield from walk(child, scope, inside)

    return walk(tree, "", False)


def mutations_of(path: Path, name: str, area: str) -> dict[int, list[Mutant]]:
    """Return every mutation of the lines of functions in a file, by line; `name` is the path in the tree."""
    source = path.read_bytes()
    starts = [0]
    for row in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(row))
    found: dict[int, list[Mutant]] = defaultdict(list)
    for node, scope, inside in nodes_in_code(ast.parse(source)):
        for old, new, change in replacements(node) if inside else ():
            start = starts[old.lineno - 1] + old.col_offset  # type: ignore[attr-defined]
            end = starts[old.end_lineno - 1] + old.end_col_offset  # type: ignore[attr-defined]
            text = new if isinstance(new, str) else ast.unparse(ast.fix_missing_locations(new))
            if isinstance(new, ast.expr):
                text = f"({text})"
            line = old.lineno  # type: ignore[attr-defined]
            found[line].append(Mutant(area, name, line, scope, change, start, end, text))
    return found


def functions_of(source: bytes) -> dict[str, list[int]]:
    """Return the first line of the body and the last line of every function and class."""
    found = {}
    for node, scope, _ in nodes_in_code(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[scope] = [node.body[0].lineno, node.end_lineno or node.lineno]
    return found


def first_line(source: bytes, line: int) -> int:
    """Return the first line of the simple statement at `line`, to which coverage counts all of its lines."""
    for node in ast.walk(ast.parse(source)):
        simple = isinstance(node, ast.stmt) and not hasattr(node, "body")
        if simple and node.lineno <= line <= (node.end_lineno or node.lineno):
            return node.lineno
    return line
