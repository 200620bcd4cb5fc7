"""Registries find members by importing their package, and refuse unknown names."""

from __future__ import annotations

import importlib
import sys

import pytest

from bitmill.config.registry import Registry
from bitmill.errors import RecipeError
from bitmill.formats import FORMATS
from bitmill.recipes.method import METHODS
from bitmill.runtime.kernels.base import KERNELS
from bitmill.solvers import SOLVERS
from bitmill.transforms import TRANSFORMS


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A registry over a package of two modules, of which one registers two members."""
    package = tmp_path / "zoo_of_tests"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from bitmill.config.registry import Registry\nANIMALS = Registry('animal', 'zoo_of_tests')\n"
    )
    head = "from zoo_of_tests import ANIMALS\n"
    (package / "cats.py").write_text(head + "@ANIMALS.register('lion')\nclass Lion: pass\n")
    (package / "birds.py").write_text(
        head + "@ANIMALS.register('owl')\nclass Owl: pass\nANIMALS.register('ara')('an ara')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("zoo_of_tests").ANIMALS
    for name in [n for n in sys.modules if n.startswith("zoo_of_tests")]:
        del sys.modules[name]


def test_lazy_discovery(registry):
    assert "zoo_of_tests.cats" not in sys.modules
    assert registry.names() == ["ara", "lion", "owl"]
    assert registry.get("lion").__name__ == "Lion"
    assert [name for name, _ in registry.items()] == ["ara", "lion", "owl"]


def test_unknown_name_message(registry):
    with pytest.raises(RecipeError, match=r"no animal 'cow'; choose one of: ara, lion, owl\."):
        registry.get("cow")


def test_duplicate_name_refused(registry):
    lion = registry.get("lion")
    assert registry.register("lion")(lion) is lion  # an identical member, as on a reload
    with pytest.raises(RuntimeError, match="registered twice"):
        registry.register("lion")(object())


def test_name_of_member(registry):
    lion = registry.get("lion")
    assert registry.name_of(lion) == registry.name_of(lion()) == "lion"
    with pytest.raises(RecipeError, match="not a registered animal"):
        registry.name_of(3)


@pytest.mark.parametrize("nouns", [FORMATS, SOLVERS, TRANSFORMS, METHODS, KERNELS], ids=lambda r: r.noun)
def test_registered_names(nouns: Registry):
    assert nouns.names()
    for name, member in nouns.items():
        assert nouns.name_of(member) == name
