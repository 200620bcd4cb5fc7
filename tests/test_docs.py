"""Names, commands, code and links in the documentation are valid."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
import statistics
import sys
import tomllib
from pathlib import Path

import pytest
import typer.main

import bitmill
from bitmill.allocators import ALLOCATORS
from bitmill.cli.main import app
from bitmill.formats import FORMATS
from bitmill.kv import KV_METHODS
from bitmill.kv.config import parse_kv_config
from bitmill.recipes.method import METHODS
from bitmill.recipes.recipe import Recipe
from bitmill.sensitivities import SENSITIVITIES
from bitmill.solvers import SOLVERS
from bitmill.transforms import TRANSFORMS
from bitmill.tuners import TUNERS

ROOT = Path(__file__).parents[1]
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
COMMANDS = typer.main.get_command(app).commands
MAX_LINES, MEDIAN_LINES = 500, 150
FORBIDDEN = ("/work/", "../shared", "helper session", "TODO", "FIXME", "lorem")


def _generate():
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATED = _generate().pages()
TEXTS = {str(f.relative_to(ROOT)): f.read_text(encoding="utf-8") for f in DOCS}
TEXTS |= {f"docs/{path}": text for path, text in GENERATED.items() if path.startswith(("methods/", "kv/"))}
every_page = pytest.mark.parametrize("page", sorted(TEXTS))


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def _without_code(text: str) -> str:
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def _anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    slugs = (re.sub(r"[^\w\s-]", "", h.replace("`", "")).strip().lower() for h in headings)
    return {re.sub(r"[-\s]+", "-", slug) for slug in slugs}


PYTHON = [
    pytest.param(page, block, id=f"{page}-{n}")
    for page, text in TEXTS.items()
    for n, block in enumerate(_blocks(text, "python"))
]
SHELL = [
    (page, line) for page, text in TEXTS.items() for block in _blocks(text, "sh") for line in block.splitlines()
]


@pytest.mark.parametrize(("page", "block"), PYTHON)
def test_python_snippets(page: str, block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "bitmill":
            assert hasattr(bitmill, node.attr), f"{page}: bitmill.{node.attr}"
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bitmill"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, name.name) for name in node.names), f"{page}: {node.module}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "bitmill.quantize":
            _check_quantize(page, node)


def _check_quantize(page: str, call: ast.Call) -> None:
    """Keywords are parameters or options of the named method."""
    allowed = set(inspect.signature(bitmill.quantize).parameters)
    if len(call.args) > 1 and isinstance(call.args[1], ast.Constant) and call.args[1].value != "none":
        allowed |= set(METHODS.get(call.args[1].value).__dataclass_fields__)
    assert {k.arg for k in call.keywords} <= allowed, page


@pytest.mark.parametrize(
    ("page", "line"), [c for c in SHELL if c[1].startswith("bitmill ")], ids=lambda value: str(value)[:60]
)
def test_commands_exist(page: str, line: str) -> None:
    words = line.partition("#")[0].split()
    command = COMMANDS[words[1]]
    command = command.commands[words[2]] if hasattr(command, "commands") else command
    allowed = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= allowed
    if "--method" in words:
        assert words[words.index("--method") + 1] in [*METHODS.names(), "none"]
    if "--kv" in words:
        kv = parse_kv_config(words[words.index("--kv") + 1], None, None)
        assert kv.name == "none" or kv.method()


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_commands_documented(name: str) -> None:
    text = TEXTS["docs/cli.md"]
    start = text.index(f"\n## bitmill {name}\n")
    section = text[start : text.find("\n## ", start + 1)]
    commands = [COMMANDS[name], *getattr(COMMANDS[name], "commands", {}).values()]
    options = [o for c in commands for p in c.params for o in (*p.opts, *p.secondary_opts) if o.startswith("--")]
    for option in options:
        if option not in (
            "--quality",
            "--help",
            "--verbose",
            "--quiet",
        ):  # documented by its opposite or once for all
            assert option in section, f"{option} of bitmill {name}"


def test_members_documented() -> None:
    for registry in (ALLOCATORS, FORMATS, SENSITIVITIES, SOLVERS, TRANSFORMS, TUNERS):
        for name in registry.names():
            assert f"\n### `{name}`\n" in GENERATED["parts.md"], name
    for name in METHODS.names():
        page = GENERATED[f"methods/{name}.md"]
        assert all(f"`{option}`" in page for option in METHODS.get(name).__dataclass_fields__)
    for name in KV_METHODS.names():
        assert all(f"`{option}`" in GENERATED[f"kv/{name}.md"] for option in KV_METHODS.options(name))


def test_recipes_can_be_built() -> None:
    for text in TEXTS.values():
        for block in _blocks(text, "yaml"):
            Recipe.from_yaml(block)
        for block in re.findall(r'Recipe\.from_yaml\("""(.*?)"""\)', text, re.DOTALL):
            Recipe.from_yaml(block)


@every_page
def test_links_resolve(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", _without_code(TEXTS[page])):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / page).parent.joinpath(path).resolve() if path else ROOT / page
        name = found.relative_to(ROOT).as_posix()
        exists = found.is_file() or name.removeprefix("docs/") in GENERATED
        assert exists, f"{page} links to {target}"
        if anchor:
            assert anchor in _anchors(TEXTS[name]), f"{page} links to {target}"


@every_page
def test_words(page: str) -> None:
    for word in FORBIDDEN:
        assert word.lower() not in TEXTS[page].lower()


def test_documented_reader() -> None:
    """docs/checkpoint.md decodes the fixtures of the tabular formats, with Python's standard library alone."""
    (code,) = [b for b in _blocks(TEXTS["docs/checkpoint.md"], "python") if "def decode" in b]
    reader: dict = {}
    exec(code, reader)
    imports = [n for n in ast.walk(ast.parse(code)) if isinstance(n, (ast.Import, ast.ImportFrom))]
    assert sorted(ast.unparse(n) for n in imports) == ["import json", "import struct"]
    codings = json.loads((ROOT / "src/bitmill/formats/data/codings.json").read_text())
    tables = ("affine", "binary_coding", "codebook", "integer_coding", "uniform")  # others: see their formats
    tables += ("float", "half_integer", "microscaling", "normal_float", "nvfp4", "sum")
    tables += ("power_of_two", "post", "apot", "power", "signed_scale", "super_block", "super_block_offset")
    described = [ROOT / "tests" / "fixtures" / f"{name}.json" for name in tables]
    for file in described:
        stored = reader["read_safetensors"](file.with_suffix(".safetensors"))
        for index, case in enumerate(json.loads(file.read_text())):
            tensors = {k.partition(".")[2]: v for k, v in stored.items() if k.startswith(f"{index}.")}
            decoded = reader["decode"](case["format"], tensors, case["shape"], codings)
            for row, expected in zip(decoded, case["decoded"], strict=True):
                assert row == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_architecture_picture() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (c["layers"] for c in contracts if c["type"] == "layers")
    picture = (ROOT / "docs/assets/architecture.svg").read_text().partition("Import layers")[2]
    rows: dict[int, list[str]] = {}
    for y, name in re.findall(r'<text class="name" x="[\d.]+" y="(\d+)">(\w+)</text>', picture):
        rows.setdefault(int(y), []).append(name)
    assert [" | ".join(rows[y]) for y in sorted(rows)] == layers


def test_source_files_are_short() -> None:
    lengths = {
        str(f.relative_to(ROOT)): len(f.read_text(encoding="utf-8").splitlines())
        for folder in ("src", "tests", "docs", "examples", "benchmarks")
        for f in (ROOT / folder).rglob("*.py")
    }
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}
    assert statistics.median(n for name, n in lengths.items() if name.startswith("src/")) < MEDIAN_LINES


def test_readme_parts() -> None:
    generate = sys.modules.get("docs_generate") or _generate()
    for page, text in TEXTS.items():
        for part in re.findall(r"<!-- readme:(\w+) -->", text):
            assert generate.readme_part(part), page
