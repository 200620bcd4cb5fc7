"""Statistics that the rotated format needs."""

from __future__ import annotations

from bitmill.formats.permuted import Permuted
from bitmill.formats.rotated import Rotated
from bitmill.formats.uniform import Uniform


def test_needs():
    assert Rotated(Uniform(3)).needs == Uniform(3).needs
    assert Rotated(Uniform(3), rescale=True).needs == Uniform(3).needs | {"gram"}
    inner = Permuted(Uniform(3))
    assert inner.needs
    assert Rotated(inner).needs == inner.needs
