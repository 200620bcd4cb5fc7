"""Formats of inputs as they are spelled: defaults, and what a format's standard fixes."""

from __future__ import annotations

import pytest

from bitmill.errors import RecipeError
from bitmill.recipes.attention import parse_attention
from bitmill.recipes.inputs import Inputs, parse_inputs


@pytest.mark.parametrize(
    ("spelled", "bits", "group_size"),
    [
        ("uniform", 8, "row"),
        ("uniform:bits=4,group_size=64", 4, 64),
        ("float:element=e2m1", 4, "row"),
        ("pyramid", 4, "row"),
        ("nvfp4", 4, 16),
        ("nvfp4:group_size=16", 4, 16),
        ("microscaling", 4, 32),
        ("microscaling:element=e4m3", 8, 32),
    ],
)
def test_defaults_follow_the_format(spelled, bits, group_size):
    for format in (parse_inputs(spelled).format, parse_attention([f"keys={spelled}"]).keys):
        assert (format.bits, format.group_size) == (bits, group_size)


@pytest.mark.parametrize("spelled", ["nvfp4:group_size=row", "microscaling:group_size=64"])
def test_groups_that_are_not_the_standards_are_refused(spelled):
    with pytest.raises(RecipeError, match=r"has a scale for (16|32) columns of a token; leave group_size out\.$"):
        parse_inputs(spelled)
    with pytest.raises(RecipeError, match="leave group_size out"):
        parse_attention([f"values={spelled}"])


@pytest.mark.parametrize(
    "data", [{}, {"format": 3}, {"format": "microscaling", "element": []}, {"format": "sum"}, {"format": "absent"}]
)
def test_damaged_data_is_refused(data):
    with pytest.raises(RecipeError):
        Inputs.from_dict(data)
