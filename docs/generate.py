"""Generated pages of the site: one for every method, one for the parts of recipes, and those in the root folder.

mkdocs calls the functions named on_* (mkdocs.yml, `hooks`). The pages are made from the cards and the options of
the methods, so that they match the output of `bitmill methods NAME`.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BORROWED = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
_CARD_LINE = re.compile(r"^([A-Z][a-z]+) {2,}(.*)$")
_MATRIX = (2048, 2048)
_CACHE = (8, 128)


def pages() -> dict[str, str]:
    """Return site path -> Markdown of every page that is not a file under docs/."""
    from bitmill.kv import KV_METHODS
    from bitmill.recipes.method import METHODS

    made = {f"methods/{name}.md": method_page(name, kind) for name, kind in METHODS.items()}
    made |= {f"kv/{name}.md": kv_page(name, kind) for name, kind in KV_METHODS.items()}
    made["methods/index.md"] = methods_index(METHODS.items())
    made["parts.md"] = parts_page()
    for path, file in BORROWED.items():
        # links written for the root of the repository
        made[path] = (ROOT / file).read_text(encoding="utf-8").replace("](docs/", "](")
    return made


def method_page(name: str, kind: type) -> str:
    """Return the page of one method: card, options, recipe and cost."""
    recipe = kind().recipe()
    bits = recipe.default.format.stored_bits(_MATRIX) / (_MATRIX[0] * _MATRIX[1])
    origin = f"Source: `src/{kind.__module__.replace('.', '/')}.py`"
    test = f"tests/methods/test_{name}.py"
    if (ROOT / test).exists():
        origin += f"; the test of the paper's claim: `{test}`"
    lines = [
        *_opening(kind, name, f"bitmill quantize smollm2-135m --method {name} -o smollm2-{name}"),
        "",
        "## Options",
        "",
        "Each is set with `--set NAME=VALUE`, or by its name in Python; `bits` and `group_size` have flags too.",
        "",
        *_options(kind),
        "",
        "## Recipe",
        "",
        f"The defaults store {bits:.3f} bits per weight in a matrix of {_MATRIX[0]} x {_MATRIX[1]}, everything "
        "included. As a recipe file, for changing parts without an option:",
        "",
        "```yaml",
        recipe.to_yaml().rstrip(),
        "```",
        "",
        f"{origin}.",
        "",
    ]
    return "\n".join(lines)


def kv_page(name: str, kind: type) -> str:
    """Return the page of one method for keys and values: card, options and cost."""
    from bitmill.kv.page import PageLayout

    scheme = kind().scheme()
    heads, dim = _CACHE
    bits = PageLayout(scheme, heads, dim).words / (2 * heads * dim)
    make = [f"bitmill quantize smollm2-135m --method none --kv {name} -o smollm2-{name}"] * scheme.is_calibrated
    measure = f"bitmill eval {f'smollm2-{name}' if make else 'smollm2-135m'} --kv {name} --seqlen 2048"
    lines = [
        *_opening(kind, name, *make, measure),
        "",
        "See [Keys and values](../kv.md).",
        "",
        "## Options",
        "",
        "Each is set with `--kv-set NAME=VALUE`, or by its name in Python; `bits` has the flag `--kv-bits` too.",
        "",
        *_options(kind),
        "",
        f"The defaults take {bits:.3f} bits per number in pages of {heads} heads of {dim} numbers, everything "
        "included except the calibrated tables of each layer.",
        "",
        f"Source: `src/{kind.__module__.replace('.', '/')}.py`.",
        "",
    ]
    return "\n".join(lines)


def _options(kind: type) -> list[str]:
    """Return the options of a method as the lines of a table."""
    rows = [("option", "default", "type", "meaning"), ("---", "---", "---", "---")]
    for field in dataclasses.fields(kind):
        help_text = str(field.metadata.get("help", "")).replace("|", "\\|")
        kind_text = str(field.type).replace("|", "\\|")
        rows.append((f"`{field.name}`", f"`{_plain(field.default)}`", kind_text, help_text))
    return [f"| {' | '.join(row)} |" for row in rows]


def methods_index(members: Any) -> str:
    """Return the list of methods."""
    lines = ["# Methods", "", "One published method per page, generated from its source file.", ""]
    lines += ["| method | description | default storage | calibration |", "|---|---|---|---|"]
    for name, kind in members:
        recipe = kind().recipe()
        bits = recipe.default.format.stored_bits(_MATRIX) / (_MATRIX[0] * _MATRIX[1])
        first = (inspect.getdoc(kind) or "").partition("\n")[0]
        text = "text" if recipe.needs else "none"
        stored = f"`{recipe.default.format.name}`, {bits:.3f} bits per weight"
        lines.append(f"| [{name}]({name}.md) | {first} | {stored} | {text} |")
    return "\n".join(lines) + "\n"


def parts_page() -> str:
    """Return the page of parts: those of recipes from the docstrings of their modules, others from their own."""
    from bitmill.allocators import ALLOCATORS
    from bitmill.formats import FORMATS
    from bitmill.sensitivities import SENSITIVITIES
    from bitmill.solvers import SOLVERS
    from bitmill.transforms import TRANSFORMS
    from bitmill.tuners import TUNERS

    lines = ["# Parts of recipes", ""]
    lines += [
        "The parts for `--format`, `--solver`, `--transform` and `--tuner`, generated from the source files.",
        "",
    ]
    for registry in (FORMATS, SOLVERS, TRANSFORMS, TUNERS):
        lines += [f"## {registry.noun.capitalize()}s", ""]
        for name, kind in registry.items():
            options = ", ".join(f"`{field.name}`" for field in dataclasses.fields(kind)) or "none"
            described = inspect.getdoc(inspect.getmodule(kind)) or ""
            lines += [f"### `{name}`", "", "```text", described, "```", "", f"Options: {options}", ""]
    lines += ["The parts for `--sensitivity` and `--allocator` of a [budget](budget.md):", ""]
    for title, registry in (("Sensitivities", SENSITIVITIES), ("Allocators", ALLOCATORS)):
        lines += [f"## {title}", ""]
        for name, kind in registry.items():
            options = ", ".join(f"`{field.name}`" for field in dataclasses.fields(kind)) or "none"
            lines += [
                f"### `{name}`",
                "",
                "```text",
                inspect.getdoc(kind) or "",
                "```",
                "",
                f"Options: {options}",
                "",
            ]
    return "\n".join(lines)


def _opening(kind: Any, name: str, *commands: str) -> list[str]:
    """Return a method's name, its card and its usage."""
    first, _, rest = (inspect.getdoc(kind) or "").partition("\n")
    return [f"# {name}", "", first, "", *_card(rest), "", "## Use", "", "```sh", *commands, "```"]


def _card(card: str) -> list[str]:
    """Return the "Word   text" entries of a card as paragraphs, formulas as code."""
    entries: list[tuple[str, list[str]]] = []
    for line in textwrap.dedent(card).strip().splitlines():
        found = _CARD_LINE.match(line)
        if found:
            entries.append((found[1], [found[2]]))
        elif entries and line.strip():
            entries[-1][1].append(line.strip())
    shown: list[str] = []
    for word, lines in entries:
        if word == "Equation":
            shown += [f"**{word}**", "", "```text", *lines, "```", ""]
        else:
            shown += [f"**{word}**: {_markdown(' '.join(lines))}", ""]
    return shown


def _markdown(text: str) -> str:
    """Escape markup in plain text; link arXiv numbers."""
    text = re.sub(r"([*_<])", r"\\\1", text)
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# -- mkdocs -------------------------------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    """List the pages of the sections that are folders."""
    methods = sorted(path for path in pages() if path.startswith("methods/") and not path.endswith("index.md"))
    notes = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    packed = sorted(path for path in pages() if path.startswith("kv/"))
    sections = {
        "kv/": ["kv.md", *packed],
        "methods/": ["methods/index.md", *methods],
        "decisions/": [f"decisions/{note.name}" for note in notes],
    }
    config.nav = [
        {title: sections.get(target, target) if isinstance(target, str) else target}
        for entry in config.nav
        for title, target in entry.items()
    ]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not files."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace `<!-- readme:PART -->` by that part of the README."""
    return re.sub(r"<!-- readme:(\w+) -->", lambda found: readme_part(found[1]), markdown)


def readme_part(name: str) -> str:
    """Return the text of README.md between `<!-- NAME:begin -->` and `<!-- NAME:end -->`."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    _, _, rest = readme.partition(f"<!-- {name}:begin -->")
    part, end, _ = rest.partition(f"<!-- {name}:end -->")
    if not end:
        raise ValueError(f"README.md has no part {name!r}")
    return part.strip().replace("](docs/", "](")
