"""Listings read from source agree with the registered classes."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

from bitmill.cli.catalog import describe_option
from bitmill.config.listing import listings
from bitmill.formats import FORMATS
from bitmill.kv import KV_METHODS
from bitmill.recipes.method import METHODS
from bitmill.solvers import SOLVERS
from bitmill.transforms import TRANSFORMS
from bitmill.tuners import TUNERS


@pytest.mark.parametrize(
    "registry", [METHODS, KV_METHODS, FORMATS, SOLVERS, TRANSFORMS, TUNERS], ids=lambda registry: registry.noun
)
def test_members(registry):
    found = listings(registry.package)
    assert {name: one.card for name, one in found.items()} == {
        name: inspect.getdoc(kind) for name, kind in registry.items()
    }
    for name, one in found.items():
        if one.options is not None:
            fields = [f for f in dataclasses.fields(registry.get(name)) if f.init]
            assert one.options == [describe_option(f) for f in fields]


def test_methods_need_no_import():
    for registry in (METHODS, KV_METHODS):
        assert all(one.options for one in listings(registry.package).values())
