"""Documents of users are bounded before they are read."""

from __future__ import annotations

import os

import pytest

from bitmill.config.documents import load_json, load_yaml, read_document
from bitmill.config.paths import user_path
from bitmill.errors import RecipeError, UsageError
from bitmill.recipes.recipe import Recipe

LISTS = ", ".join(["&l0 [x, x]"] + [f"&l{i} [*l{i - 1}, *l{i - 1}]" for i in range(1, 31)])
MAPS = ", ".join(["m0: &m0 {x: x}"] + [f"m{i}: &m{i} {{x: *m{i - 1}, y: *m{i - 1}}}" for i in range(1, 31)])
MERGED = ", ".join(["m0: &m0 {x: x}"] + [f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}]}}" for i in range(1, 31)])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"a: [{LISTS}]", "more than 100,000 values"),
        (f"a: {{{MAPS}}}", "more than 100,000 values"),
        (f"a: {{{MERGED}}}", "more than 100,000 values"),
        ("a: &a {b: *a}", "contains itself"),
        ("a: &a [*a]", "contains itself"),
        ("[" * 5000, "nested too deeply"),
        ("[" * 60 + "]" * 60, "nested too deeply"),
        ("a: 0x" + "f" * 5000, "more than 64 bits"),
        ("a: " + "9" * 5000, "4300 digits"),
        ("a: {[", "in line 1"),
        ("a: 2001-99-99", "month"),
        ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("? [a]\n: b", "unhashable"),
    ],
)
def test_refused_yaml(text, reason):
    with pytest.raises(ValueError, match=reason):
        load_yaml(text)
    with pytest.raises(RecipeError, match=r"^The recipe is not valid YAML: .*\.$"):
        Recipe.from_yaml(text)


def test_yaml():
    assert load_yaml("a: &a {x: 1}\nb: *a\nc: [1e-3, 0x10, yes]") == {
        "a": {"x": 1}, "b": {"x": 1}, "c": ["1e-3", 16, True],
    }  # fmt: skip
    assert load_yaml("") is None


def test_deep_json():
    with pytest.raises(ValueError, match="nested too deeply"):
        load_json("[" * 100_000 + "]" * 100_000)


def test_files(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("a: 1", encoding="utf-8-sig")
    assert read_document(file, "recipe file", RecipeError) == "a: 1"
    os.mkfifo(tmp_path / "pipe.yaml")
    with file.open("r+b") as handle:
        handle.truncate(10**10)
    (tmp_path / "bytes.yaml").write_bytes(b"a\xff")
    reasons = {"pipe": "no regular file", "a": "has 10,000 MB", "bytes": "byte 1 is 0xff", "none": "There is no"}
    for name, reason in reasons.items():
        with pytest.raises(RecipeError, match=reason):
            read_document(tmp_path / f"{name}.yaml", "recipe file", RecipeError)
    with pytest.raises(RecipeError, match="no regular file"):
        read_document(tmp_path, "recipe file", RecipeError)


def test_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    assert str(user_path("~/models/a")) == "/home/me/models/a"
    assert str(user_path("models/~")) == "models/~"
    with os.scandir(tmp_path.parent) as entries:
        assert tmp_path in [user_path(entry) for entry in entries]
    with pytest.raises(UsageError, match="give text"):
        user_path(b"a")
    for path in ("a" * 256, "a/" * 3000, "a\0b", "a\ud900b"):
        with pytest.raises(UsageError, match=r"^The path 'a.*\.$"):
            user_path(path)
