"""The import hook registers the quantizer once transformers is imported."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import pytest

from bitmill.integrations import transformers_hook as hook

REGISTRY, QUANTIZER_MODULE = "bitmill_test_library.auto", "bitmill_test_teacher"


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A library with a registry that is not imported yet, and the function that registers in it."""
    package = tmp_path / "bitmill_test_library"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "auto.py").write_text("KNOWN = []\n")
    (tmp_path / f"{QUANTIZER_MODULE}.py").write_text(f"from {REGISTRY} import KNOWN\nKNOWN.append('bitmill')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(hook, "REGISTRATIONS", {REGISTRY: QUANTIZER_MODULE})
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, hook._Finder)])
    yield package
    for name in [name for name in sys.modules if name.startswith("bitmill_test_")]:
        del sys.modules[name]


def registered_names() -> list[str]:
    return importlib.import_module(REGISTRY).KNOWN


def test_registered_on_import(library):
    hook.register_with_transformers()
    assert REGISTRY not in sys.modules
    assert QUANTIZER_MODULE not in sys.modules
    assert registered_names() == ["bitmill"]


def test_registered_if_imported(library):
    registered = registered_names()
    assert registered == []
    hook.register_with_transformers()
    assert registered == ["bitmill"]


@pytest.mark.parametrize("probed", ["bitmill_test_library", REGISTRY])
def test_find_spec_before_import(library, probed):
    hook.register_with_transformers()
    assert importlib.util.find_spec(probed) is not None
    assert QUANTIZER_MODULE not in sys.modules
    assert registered_names() == ["bitmill"]


def test_failed_import_can_repeat(library):
    source = (library / "auto.py").read_text()
    (library / "auto.py").write_text("raise ImportError('not yet')\n")
    hook.register_with_transformers()
    with pytest.raises(ImportError, match="not yet"):
        registered_names()
    (library / "auto.py").write_text(source)
    importlib.invalidate_caches()
    assert registered_names() == ["bitmill"]


def test_registration_is_idempotent(library):
    hook.register_with_transformers()
    hook.register_with_transformers()
    assert sum(isinstance(finder, hook._Finder) for finder in sys.meta_path) == 1
    assert registered_names() == ["bitmill"]
