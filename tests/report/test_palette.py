"""The colors of methods are distinguishable, also with color blindness, and contrast with the background."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bitmill.report.charts import DARK, DARK_PANEL, LIGHT, LIGHT_PANEL, SHAPES, marker_of

# G. M. Machado, M. M. Oliveira, L. A. F. Fernandes: A physiologically-based model for simulation of color vision
# deficiency, 2009; severity 1, on linear RGB
SIGHT = {
    "trichromacy": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.01182, 0.04294, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.3039],
    ],
}
THEMES = {"light": (LIGHT, LIGHT_PANEL), "dark": (DARK, DARK_PANEL)}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    ratio = TO_XYZ @ np.clip(rgb, 0, 1) / np.array([0.9505, 1.0, 1.089])
    f = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(one: str, other: str) -> float:
    dark, light = sorted(float(TO_XYZ[1] @ linear(colour)) for colour in (one, other))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("sight", SIGHT)
def test_colors_differ(theme, sight):
    seen = [lab(np.array(SIGHT[sight]) @ linear(colour)) for colour in THEMES[theme][0]]
    nearest = min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2))
    assert nearest > 20  # 2.3 is just noticeable


@pytest.mark.parametrize("theme", THEMES)
def test_color_contrast(theme):
    colours, panel = THEMES[theme]
    assert min(contrast(colour, panel) for colour in colours) >= 3  # WCAG 2, 1.4.11


def test_distinct_markers():
    marks = [marker_of(index) for index in range(64)]
    assert len(set(marks)) == 64
    assert {mark.colour for mark in marks} == set(range(len(LIGHT)))
    assert {mark.shape for mark in marks} == set(range(len(SHAPES)))
