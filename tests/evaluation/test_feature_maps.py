"""Features of patches keep the shape of the picture."""

from __future__ import annotations

import pytest

from bitmill.evaluation.feature_maps import patch_grid


@pytest.mark.parametrize(
    ("tokens", "size", "patch", "expected"),
    [
        (17, (16, 16), 4, (4, 4)),
        (25, (16, 24), 4, (4, 6)),  # with the class it is 5 x 5, which is no grid of this picture
        (25, (16, 24), None, (4, 6)),
        (21, (16, 16), 4, (4, 4)),  # the class and four registers
        (49, (224, 224), 4, (7, 7)),  # patches that were merged
        (13, (16, 16), None, (3, 3)),
        (40, (16, 16), None, (6, 6)),
        (3, (224, 32), 16, None),
    ],
)
def test_grid(tokens: int, size: tuple[int, int], patch: int | None, expected: tuple[int, int] | None) -> None:
    assert patch_grid(tokens, size, patch) == expected
