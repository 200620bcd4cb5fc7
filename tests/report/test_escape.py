"""Names of users are shown as they are: in a terminal, in Markdown, in YAML."""

from __future__ import annotations

import copy
import io
import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from bitmill.cli.output import data_table, one_line, property_table
from bitmill.files import write_json
from bitmill.report.card import model_card
from bitmill.report.comparison import comparison_table
from bitmill.report.escape import code_block, code_span, markdown_text, printable, terminal_text
from helpers.sample_results import report

NAMES = [
    "a[bold]b",
    "p[/x]",
    "q[",
    "a\\[b",
    "<b>x</b>",
    "<img src=x onerror=alert(1)>",
    "--- \n key: v",
    "---",
    "a|b",
    "`x`",
    "``` x",
    "a\nb",
    ":warning: 🐢",
    'it\'s "x"',
    "{{7*7}}",
    "{% raw %}",
    "*a* _b_ __c__ ~~d~~",
    "[a](http://b)",
    "!x",
    "&amp;",
    "$x$",
    "- a: b #c",
    "yes",
    "1e3",
    "a\x1b[31mb",
    "a\u202eb",
    "a\udcffb",
]
TEXTS = st.one_of(
    st.sampled_from(NAMES),
    st.text(st.sampled_from(list("ab[]()<>|`*_~\\:&;#$!{}%'\"\n \x1b\udcff-.1é🐢")), max_size=30),
)
MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def printed(*parts) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=400, highlight=False)
    for part in parts:
        console.print(part)
    return stream.getvalue()


def shown(markdown: str) -> list[str]:
    """The texts of a document, in order, with code and without any other markup."""
    texts = []
    for token in MARKDOWN.parse(markdown):
        if token.type == "inline":
            kinds = {part.type for part in token.children}
            assert kinds <= {"text", "code_inline", "softbreak", "text_special"}, kinds
            texts.append("".join(part.content for part in token.children))
        else:
            assert token.type != "html_block"
            texts += [token.content] if token.type == "fence" else []
    return texts


@given(TEXTS)
def test_terminal(name):
    assert printable(name) in printed(terminal_text(name))
    tables = (
        property_table([("model", name)]),
        data_table(("name",), [(name,)]),
        comparison_table([{"name": name}], name),
    )
    for table in tables:
        assert printable(name).strip() in printed(table)
    assert "\x1b" not in one_line(name)


@given(TEXTS)
def test_markdown(name):
    line = printable(name)
    assert shown(f"# The {markdown_text(name)}.") == [f"The {line}."]
    assert shown(f"| a |\n|---|\n| x{markdown_text(name)}x |\n") == ["a", f"x{line}x"]
    if line.strip():
        assert shown(f"The {code_span(name)}.") == [f"The {line}."]
        assert shown(f"| a |\n|---|\n| {code_span(name, in_table=True)} |\n")[1].strip() == line.strip()
    assert (
        shown(code_block("x" + name.replace("\udcff", ""), "yaml"))[0].strip()
        == ("x" + name.replace("\udcff", "")).strip()
    )


@pytest.mark.parametrize("name", NAMES)
def test_card(name):
    """The name in every place a user can put one."""
    given = copy.deepcopy(report())
    given["source"] = name
    given["recipe"] = {**given["recipe"], "name": name, "ignore": [name]}
    given["identity"]["calibration"]["source"] = name
    given["measured"] = [{**given["measured"][0], "text": name}]
    given["layers"][0]["name"] = name
    card = model_card(given)
    _, front, body = card.split("---\n", 2)
    data = yaml.safe_load(front)
    assert data["base_model"] == name
    assert name in data["tags"]
    texts = shown(body)
    line = printable(name)
    assert texts[0].startswith(f"{line}, quantized by bitmill ({line}, ")
    assert f"{line}, eval split" in texts
    assert any(yaml.safe_load(text) == given["recipe"] for text in texts if text.startswith("name:"))


def test_half_surrogates_are_written(tmp_path):
    write_json(tmp_path / "a.json", {"source": "a\udcff"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"source": "a\udcff"}
