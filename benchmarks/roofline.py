"""The roofline of the matrix-vector kernels as SVG: limits of the machine, and the speed of each kernel."""

from __future__ import annotations

import math
from statistics import median
from typing import Any
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 1120, 640
LEFT, RIGHT, TOP, BOTTOM = 92, 232, 84, 76
FAMILIES = {
    "uniform": "uniform",
    "codebook": "codebook",
    "binary_coding": "binary coding",
    "integer_coding": "integer coding",
}
OTHERS = "other formats"
STYLE = """
    .page { fill: #fbfaf7; stroke: #dcd8cf; } .plot { fill: #ffffff; stroke: #b9b2a3; }
    text { fill: #5b564a; font-size: 14px; } .head { fill: #23201a; font-size: 20px; font-weight: 700; }
    .axis { font-size: 15px; } .bits { fill: #23201a; font-size: 13px; font-weight: 600; }
    .grid { stroke: #ebe7de; } .roof { stroke: #23201a; stroke-width: 2.5; fill: none; }
    .compute { stroke: #8a8373; stroke-width: 2; stroke-dasharray: 7 5; fill: none; }
    .share { stroke: #b9b2a3; stroke-width: 1.2; stroke-dasharray: 3 4; fill: none; }
    .f0 { fill: #c2410c; } .f1 { fill: #2563eb; } .f2 { fill: #15803d; } .f3 { fill: #a21caf; }
    .f4 { fill: #8a8373; }
    .float { fill: none; stroke: #23201a; stroke-width: 2.2; } .dot { stroke: #ffffff; stroke-width: 1; }
    @media (prefers-color-scheme: dark) {
      .page { fill: #1d1f23; stroke: #3a3e46; } .plot { fill: #25282e; stroke: #666d79; }
      text { fill: #b6bac2; } .head, .bits { fill: #f1efe9; } .grid { stroke: #33373f; }
      .roof { stroke: #f1efe9; } .compute { stroke: #9aa0ab; } .share { stroke: #666d79; }
      .f0 { fill: #fb923c; } .f1 { fill: #7fa5ff; } .f2 { fill: #4ade80; } .f3 { fill: #e879f9; }
      .f4 { fill: #9aa0ab; } .float { stroke: #f1efe9; } .dot { stroke: #25282e; }
    }"""


class Axes:
    """Logarithmic axes: x in operations a byte, y in operations a second."""

    def __init__(self, xs: list[float], ys: list[float]) -> None:
        self.x = (2 ** math.floor(math.log2(min(xs) * 0.8)), 2 ** math.ceil(math.log2(max(xs) * 1.2)))
        self.y = (2 ** math.floor(math.log2(min(ys) * 0.8)), 2 ** math.ceil(math.log2(max(ys) * 1.2)))

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the position in the picture."""
        along = math.log(x / self.x[0]) / math.log(self.x[1] / self.x[0])
        up = math.log(y / self.y[0]) / math.log(self.y[1] / self.y[0])
        width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        return round(LEFT + along * width, 1), round(TOP + (1 - up) * height, 1)


def roofline(kernels: dict[str, Any], arithmetic: float | None) -> str:
    """The picture of a result of `bitmill bench kernels`, of its largest shape.

    arithmetic: fp32 operations a second in a large matrix product, where known.
    """
    shape = max((case["shape"] for case in kernels["kernels"]), key=lambda s: s[0] * s[1])
    cases = [case for case in kernels["kernels"] if case["shape"] == shape]
    work, bandwidth = 2 * shape[0] * shape[1], kernels["read_bandwidth_GBps"] * 1e9
    float_time = median(case["time_s"] * case["speedup_vs_torch_fp32"] for case in cases)
    points = [(work / (case["GBps"] * 1e9 * case["time_s"]), work / case["time_s"], case) for case in cases]
    ys = [y for _, y, _ in points] + [work / float_time, 0.5 * bandwidth, *([arithmetic] if arithmetic else [])]
    axes = Axes([0.5, *(x for x, _, _ in points)], ys)

    body = [*_frame(axes), *_roofs(axes, bandwidth, arithmetic), *_points(axes, points)]
    x, y = axes.at(0.5, work / float_time)
    body.append(f'<path class="float" d="M{x - 6},{y - 6} l12,12 m0,-12 l-12,12"/>')
    body.append(f'<text x="{x + 12}" y="{y + 16}">torch, fp32</text>')
    title = f"Matrix-vector products, {shape[0]} x {shape[1]}, {kernels['threads']} threads"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            'aria-labelledby="title desc" font-family="system-ui, -apple-system, \'Segoe UI\', Roboto, '
            "'DejaVu Sans', sans-serif\">",
            f'  <title id="title">{escape(title)}</title>',
            '  <desc id="desc">Operations a second of every kernel over operations a byte of packed weights, '
            "under the roof that the read bandwidth makes. Fewer bits a weight lie further right.</desc>",
            f"  <style>{STYLE}\n  </style>",
            f'  <rect class="page" x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="10"/>',
            f'  <text class="head" x="{LEFT}" y="38">{escape(title)}</text>',
            f'  <text x="{LEFT}" y="62">weights read from memory; numbers at the points are bits a code</text>',
            *(f"  {line}" for line in body),
            "</svg>",
            "",
        ]
    )


def _frame(axes: Axes) -> list[str]:
    """Return frame, grid, ticks and labels of the axes."""
    (x0, y1), (x1, y0) = axes.at(axes.x[0], axes.y[1]), axes.at(axes.x[1], axes.y[0])
    made = [f'<rect class="plot" x="{x0}" y="{y1}" width="{x1 - x0:.1f}" height="{y0 - y1:.1f}"/>']
    for tick in _powers(*axes.x):
        x, _ = axes.at(tick, axes.y[0])
        made.append(f'<path class="grid" d="M{x},{y0} V{y1}"/>')
        made.append(f'<text x="{x}" y="{y0 + 20}" text-anchor="middle">{tick:g}</text>')
    for tick in _powers(*axes.y):
        _, y = axes.at(axes.x[0], tick)
        made.append(f'<path class="grid" d="M{x0},{y} H{x1}"/>')
    for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000):
        if axes.y[0] <= tick * 1e9 <= axes.y[1]:
            _, y = axes.at(axes.x[0], tick * 1e9)
            made.append(f'<text x="{x0 - 8}" y="{y + 5}" text-anchor="end">{tick}</text>')
    at = f'x="{(x0 + x1) / 2}" y="{HEIGHT - 22}"'
    made.append(f'<text class="axis" {at} text-anchor="middle">operations a byte of weights</text>')
    made.append(
        f'<text class="axis" transform="translate(30 {(y0 + y1) / 2}) rotate(-90)" text-anchor="middle">'
        "billion operations a second</text>"
    )
    return made


def _roofs(axes: Axes, bandwidth: float, arithmetic: float | None) -> list[str]:
    made = []
    for share, kind in ((1.0, "roof"), (0.5, "share")):
        last = min(axes.x[1], axes.y[1] / (share * bandwidth))
        first = max(axes.x[0], axes.y[0] / (share * bandwidth))
        (xa, ya), (xb, yb) = (axes.at(x, x * share * bandwidth) for x in (first, last))
        made.append(f'<path class="{kind}" d="M{xa},{ya} L{xb},{yb}"/>')
        slope = math.degrees(math.atan2(yb - ya, xb - xa))
        text = f"read bandwidth, {bandwidth / 1e9:.1f} GB/s" if share == 1 else "half of it"
        x, y = axes.at((first**0.62) * (last**0.38), share * bandwidth * (first**0.62) * (last**0.38))
        made.append(f'<text transform="translate({x} {y - 9}) rotate({slope:.1f})">{text}</text>')
    if arithmetic:
        (xa, y), (xb, _) = axes.at(axes.x[0], arithmetic), axes.at(axes.x[1], arithmetic)
        made.append(f'<path class="compute" d="M{xa},{y} H{xb}"/>')
        made.append(
            f'<text x="{xa + 12}" y="{y - 8}">fp32 arithmetic, {arithmetic / 1e9:.0f} billion a second</text>'
        )
    return made


def _points(axes: Axes, points: list[tuple[float, float, dict[str, Any]]]) -> list[str]:
    """Return a dot for each kernel and the legend; bits are labelled at whole widths of the first family."""
    names = [*FAMILIES.values(), OTHERS]
    made = []
    for x, y, case in sorted(points, key=lambda p: p[2]["format"] in FAMILIES):
        kind = names.index(FAMILIES.get(case["format"], OTHERS))
        px, py = axes.at(x, y)
        made.append(f'<circle class="dot f{kind}" cx="{px}" cy="{py}" r="6.5"/>')
        if kind == 0:
            made.append(f'<text class="bits" x="{px}" y="{py + 24}" text-anchor="middle">{case["bits"]}</text>')
    x0 = WIDTH - RIGHT + 26
    for index, name in enumerate(names):
        if any(FAMILIES.get(case["format"], OTHERS) == name for _, _, case in points):
            y = TOP + 14 + 26 * index
            made.append(f'<circle class="dot f{index}" cx="{x0}" cy="{y}" r="6.5"/>')
            made.append(f'<text x="{x0 + 16}" y="{y + 5}">{name}</text>')
    return made


def _powers(least: float, most: float) -> list[float]:
    return [2.0**n for n in range(round(math.log2(least)), round(math.log2(most)) + 1)]
