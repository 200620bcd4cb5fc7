"""Documents that users write: read within bounds, so that no file or value can take all memory or time.

A document is a regular file of UTF-8 text; a byte order mark, as Windows editors write it, is no part of it.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from bitmill.errors import BitmillError, one_line

MAX_RECIPE_BYTES = 1 << 22  # also of prompts: far above any that people write
MAX_NODES = 100_000  # of a YAML document, with every alias counted as what it stands for
MAX_DEPTH = 40
MAX_INTEGER = 1 << 64


def read_document(
    path: Path,
    noun: str,
    error: type[BitmillError],
    limit_bytes: int = MAX_RECIPE_BYTES,
    hint: str = "give an existing one",
) -> str:
    """Return the text of a file.

    Args:
        path: a regular file; a FIFO or a device could block or never end.
        noun: what the file is, for messages, such as "recipe file".
        error: class of the errors to raise.
        limit_bytes: a larger file is refused.
        hint: what to do where there is no file.

    Raises:
        BitmillError: of the class `error`: the file is missing, too large, or no UTF-8 text.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise error(f"The {noun} {path} is no regular file; give a text file.")
        if status.st_size > limit_bytes:
            raise error(
                f"The {noun} {path} has {status.st_size / 1e6:,.0f} MB, and at most {limit_bytes / 1e6:,.0f} MB "
                "are read; give a shorter one."
            )
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise error(f"There is no {noun} {path}; {hint}.") from None
    except UnicodeDecodeError as found:
        byte = found.object[found.start]
        raise error(
            f"The {noun} {path} is not UTF-8 text (byte {found.start} is 0x{byte:02x}); convert it first."
        ) from None
    except OSError as found:
        raise error(f"The {noun} {path} cannot be read ({found.strerror}).") from None


def read_json(path: Path, error: type[BitmillError], limit_bytes: int, hint: str) -> Any:
    """Return the data of a JSON file.

    Args:
        path: a regular file.
        error: class of the errors to raise.
        limit_bytes: a larger file is refused.
        hint: what to do where the file is missing or damaged.

    Raises:
        BitmillError: of the class `error`: the file cannot be read, or is not JSON.
    """
    try:
        return load_json(read_document(path, "file", error, limit_bytes, hint))
    except ValueError as found:
        raise error(f"{path} is not valid JSON ({one_line(found)}); {hint}.") from None


def read_json_lines(
    path: Path, noun: str, error: type[BitmillError], limit_bytes: int
) -> Iterator[tuple[int, Any]]:
    """Yield the numbers and the data of the lines of a .jsonl file that are not empty.

    Args:
        path, noun, error, limit_bytes: as for `read_document`.

    Raises:
        BitmillError: of the class `error`: the file cannot be read, or a line is not JSON.
    """
    document = read_document(path, noun, error, limit_bytes, "give a .jsonl file")
    for number, line in enumerate(document.splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield number, load_json(line)
        except ValueError as found:
            raise error(f"Line {number} of {path} is no JSON ({one_line(found)}); mend it.") from None


def read_json_object(path: Path, error: type[BitmillError], limit_bytes: int, hint: str) -> dict[str, Any]:
    """Return the object in a JSON file; arguments and errors as for `read_json`."""
    data = read_json(path, error, limit_bytes, hint)
    if not isinstance(data, dict):
        raise error(f"{path} holds {type(data).__name__} instead of an object; {hint}.")
    return data


def load_json(text: str | bytes) -> Any:
    """Return the data of JSON text. Raises ValueError, also for text nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def load_yaml(text: str) -> Any:
    """Return the plain data of YAML text.

    Raises:
        ValueError: the text is no YAML, is nested too deeply, contains itself, expands to more than MAX_NODES
            values by its aliases, or has an integer of more than 64 bits.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is None:
            return None
        _measure(node, {})
        loader = _Loader("")
        try:
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{error.problem or error.context}{line}") from None
    except yaml.YAMLError as error:
        raise ValueError(str(error).splitlines()[0].rstrip(":.")) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class _Loader(yaml.SafeLoader):
    """The safe loader of PyYAML, which refuses deep nesting and integers that no option has.

    Its scanner takes quadratic time in the depth, so the depth is bounded there.
    """

    def fetch_flow_collection_start(self, token_class: Any) -> None:
        """Scan the start of a list or mapping in brackets."""
        if self.flow_level > MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        super().fetch_flow_collection_start(token_class)

    def add_indent(self, column: int) -> bool:
        """Scan the start of an indented list or mapping."""
        if len(self.indents) > MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        return bool(super().add_indent(column))

    def construct_yaml_int(self, node: Any) -> int:
        """Return an integer."""
        value = int(super().construct_yaml_int(node))
        if abs(value) >= MAX_INTEGER:
            raise ValueError("it has an integer of more than 64 bits")
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _measure(node: Any, measured: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Return the number of values that a node expands to, and the depth to which they are nested.

    Args:
        node: a node of a composed document; an alias is the node it names.
        measured: results of the nodes that were visited, by identity; (0, 0) while one is being visited.
    """
    if known := measured.get(id(node)):
        if not known[0]:
            raise ValueError("it contains itself")
        return known
    measured[id(node)] = (0, 0)
    children = [] if isinstance(node, yaml.ScalarNode) else node.value
    if isinstance(node, yaml.MappingNode):
        children = [part for pair in children for part in pair]
    parts = [_measure(child, measured) for child in children]
    total, depth = 1 + sum(part[0] for part in parts), 1 + max((part[1] for part in parts), default=0)
    if total > MAX_NODES:
        raise ValueError(f"it stands for more than {MAX_NODES:,} values")
    if depth > MAX_DEPTH:
        raise ValueError("it is nested too deeply")
    measured[id(node)] = (total, depth)
    return total, depth
