"""Old names of arguments work for one release, and say so."""

from __future__ import annotations

import inspect

import pytest

import bitmill
from bitmill.config.arguments import renamed_arguments
from bitmill.errors import UsageError
from bitmill.workflows.sweep.run import sweep


@renamed_arguments(text_source="text")
def read(text: str = "", **options: int) -> tuple[str, dict[str, int]]:
    return text, options


def test_old_name():
    with pytest.warns(FutureWarning, match="text_source of read is now called text"):
        assert read(text_source="a", bits=3) == ("a", {"bits": 3})
    assert read("a", bits=3) == read(text="a", bits=3)


def test_both_names():
    with pytest.raises(UsageError, match="given twice"):
        read(text="a", text_source="b")


@pytest.mark.parametrize(
    ("function", "name"),
    [(bitmill.quantize, "calib"), (bitmill.compare, "calib"), (bitmill.evaluate, "text"), (sweep, "text")],
)
def test_names_of_the_command_line(function, name):
    assert name in inspect.signature(function).parameters
    assert not {"calibration", "text_source"} & set(inspect.signature(function).parameters)
