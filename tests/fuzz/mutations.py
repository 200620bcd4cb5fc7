"""Mutations of files: of bytes, of JSON, of YAML and text, of safetensors headers, and of what lies at a path."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 2**31, 2**63, -(2**63), 10**20, 1e308, -0.0, 1e-320),
    *(float("nan"), float("inf"), "", "x", "a" * 3000, "../x", "/etc/passwd", "é🐢", "\x00", "[bold]", "{{7*7}}"),
    *([], {}, [[]], [None], {"": ""}, [0] * 50, {"format": "uniform", "bits": 99}, [1e9, -1], "F32", "float16"),
]


def nodes(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values inside JSON data."""
    found = [path] if path else []
    if isinstance(data, dict):
        items: Any = data.items()
    else:
        items = enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        found += nodes(value, (*path, key))
    return found


def change_data(data: Any, draw: random.Random) -> Any:
    """Return JSON data with one value replaced, removed, doubled, renamed, or scaled."""
    paths = nodes(data)
    if not paths:
        return copy.deepcopy(draw.choice(VALUES))
    path = draw.choice(paths)
    owner = data
    for key in path[:-1]:
        owner = owner[key]
    last, value = path[-1], owner[path[-1]]
    how = draw.randrange(6)
    if how == 0:
        del owner[last]
    elif how == 1 and isinstance(owner, list):
        owner.insert(last, value)
    elif how == 1:
        owner[f"{last}{draw.choice(['x', '.0', '_'])}"] = owner.pop(last)
    elif how == 2 and isinstance(value, (int, float)) and not isinstance(value, bool):
        owner[last] = value * draw.choice([0, -1, 2, 1000]) + draw.choice([0, 1, -1])
    elif how == 3 and isinstance(value, str):
        owner[last] = change_text(value.encode(), draw).decode(errors="replace")
    elif how == 4:
        other = data
        for key in draw.choice(paths):
            other = other[key]
        owner[last] = json.loads(json.dumps(other))
    else:
        owner[last] = copy.deepcopy(draw.choice(VALUES))
    return data


def change_json(content: bytes, draw: random.Random) -> bytes:
    """Return a JSON document with some values changed; other bytes where it is none."""
    if draw.random() < 0.15:
        return change_text(content, draw)
    try:
        data = json.loads(content)
    except ValueError:
        return change_bytes(content, draw)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        data = change_data(data, draw)
    return json.dumps(data).encode()


def change_yaml(content: bytes, draw: random.Random) -> bytes:
    """Return a YAML document with some values changed."""
    import yaml

    if draw.random() < 0.3:
        return change_text(content, draw)
    return yaml.safe_dump(change_data(yaml.safe_load(content), draw), sort_keys=False).encode()


def change_text(content: bytes, draw: random.Random) -> bytes:
    """Return text with something inserted, or its bytes changed."""
    pieces = [
        b"\xef\xbb\xbf",
        b"\x00",
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"[" * 5000,
        b"{",
        b'"',
        b"\n---\n",
        b"&a [*a]",
    ]
    pieces += [b"\\ud800", b"9" * 5000, b"1e999", b"NaN", b"\n", b"<unk>", "é🐢".encode()]
    if draw.random() < 0.4:
        return change_bytes(content, draw)
    at = draw.choice([0, len(content), draw.randrange(len(content) + 1)])
    return content[:at] + draw.choice(pieces) + content[at:]


def change_bytes(content: bytes, draw: random.Random) -> bytes:
    """Return other bytes: bits flipped, runs overwritten, removed, doubled or exchanged, or another length."""
    data = bytearray(content)
    if not data:
        return draw.randbytes(draw.choice([1, 8, 100]))
    for _ in range(draw.choice([1, 1, 2, 5])):
        at = draw.randrange(len(data))
        if draw.random() < 0.3:
            at = min(at, draw.choice([8, 64, 512]), len(data) - 1)
        length = min(draw.choice([1, 2, 4, 8, 64, 1024]), len(data) - at)
        how = draw.randrange(7)
        if how == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif how == 1:
            data[at : at + length] = draw.choice([b"\x00", b"\xff", b"\x7f", b"\x80"]) * length
        elif how == 2:
            data[at : at + length] = draw.randbytes(length)
        elif how == 3:
            del data[at : at + length]
        elif how == 4:
            data[at:at] = data[at : at + length]
        elif how == 5:
            del data[at:]
        else:
            data += draw.randbytes(length)
        if not data:
            break
    return bytes(data)


def change_safetensors(content: bytes, draw: random.Random) -> bytes:
    """Return a safetensors file with its header changed as JSON, or with other bytes."""
    if draw.random() < 0.5:
        return change_bytes(content, draw)
    length = int.from_bytes(content[:8], "little")
    header = change_json(content[8 : 8 + length], draw)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


BY_SUFFIX: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".json": change_json,
    ".yaml": change_yaml,
    ".txt": change_text,
    ".jsonl": change_text,
    ".jinja": change_text,
    ".md": change_text,
    ".safetensors": change_safetensors,
}


def _remove(path: Path) -> None:
    path.unlink()


def _make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _make_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _make_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _make_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _make_empty(path: Path) -> None:
    path.unlink()
    path.touch()


def _forbid(path: Path) -> None:
    _rewrite(path, path.read_bytes())
    path.chmod(0)


PLACES = (_remove, _make_folder, _make_fifo, _make_loop, _make_device, _make_empty, _forbid)


def _rewrite(path: Path, content: bytes) -> None:
    """Replace a file that may be linked from elsewhere."""
    path.unlink()
    path.write_bytes(content)


def mutate(path: Path, draw: random.Random) -> str:
    """Change what lies at a path; returns the name of the mutation."""
    if draw.random() < 0.06:
        place = draw.choice(PLACES)
        place(path)
        return place.__name__.strip("_")
    change = BY_SUFFIX.get(path.suffix, change_bytes)
    _rewrite(path, change(path.read_bytes(), draw))
    return change.__name__
