"""Formats of inputs as they are spelled: defaults, and what a format's standard fixes."""

from __future__ import annotations

import pytest

from bitmill.errors import RecipeError
from bitmill.recipes.attention import parse_attention
from bitmill.recipes.compose import compose
from bitmill.recipes.inputs import Inputs, parse_inputs
from bitmill.recipes.method import build_recipe


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


def test_simulate_marks_only_inputs_without_a_kernel():
    rules = [
        "*.o_proj=uniform:bits=8@uniform:bits=8",
        "*.down_proj=uniform:bits=4@float",
        "*.up_proj=codebook:bits=4",
    ]
    with pytest.raises(RecipeError, match="or --simulate"):
        compose(build_recipe("rtn"), inputs="float:bits=8", rules=rules)
    found = compose(build_recipe("rtn"), inputs="float:bits=8", rules=rules, simulate=True)
    assert found.inputs.simulated
    simulated = {name: found.scheme(f"a.{name}").inputs for name in ("o_proj", "up_proj", "q_proj", "down_proj")}
    assert [one is not None and one.simulated for one in simulated.values()] == [False, True, True, False]
    exact = compose(build_recipe("w8a8"), rules=["*.up_proj=codebook:bits=4"], simulate=True)
    assert not exact.inputs.simulated
    assert exact.scheme("a.up_proj").inputs.simulated
