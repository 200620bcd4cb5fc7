"""Names and other text of users, as shown in a terminal or in Markdown: nothing in it is markup.

Pages of HTML are escaped by their templates.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

# control characters, which can move the cursor or change the order of letters, and halves of surrogate pairs
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_MARKDOWN = re.compile(r"[\\`*\[\]<>&|~$]|(?<![^\W_])_|_(?![^\W_])")


def printable(text: str) -> str:
    """Return the text on one line, with control characters as escape sequences."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


def terminal_text(text: str) -> Text:
    """Return text that rich prints as it is: brackets are no styles, and :words: no emoji."""
    from rich.text import Text

    return Text(printable(text))


def markdown_text(text: str) -> str:
    """Return Markdown that shows the text on one line, also in a cell of a table."""
    return _MARKDOWN.sub(lambda found: "\\" + found[0], printable(text))


def code_span(text: str, in_table: bool = False) -> str:
    """Return Markdown that shows the text as code on one line.

    Args:
        text: the text.
        in_table: escape what separates the cells of a table, which only there can be escaped in code.
    """
    text = printable(text).replace("|", r"\|" if in_table else "|")
    fence = "`" * (_longest_run(text) + 1)
    gap = " " if len(fence) > 1 else ""
    return f"{fence}{gap}{text}{gap}{fence}"


def code_block(text: str, language: str) -> str:
    """Return Markdown of a block of code, with a fence that does not occur in it."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _longest_run(text: str) -> int:
    """Return the length of the longest run of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)
