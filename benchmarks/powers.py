"""Relative squared errors of a model's weights in formats of powers and in uniform levels, without text.

python benchmarks/powers.py smollm2-135m [--group row] [--every 1] [--rows 1]
"""

from __future__ import annotations

import argparse

from torch import Tensor

from bitmill.calibration.walk import walk_blocks
from bitmill.formats import FORMATS, GroupFormat
from bitmill.formats.power import Power
from bitmill.formats.quantized import fit_matrix, nearest_matrix
from bitmill.models.streamed import StreamedModel
from bitmill.recipes.method import parse_group_size
from bitmill.solvers.base import output_error
from bitmill.sources.open import open_source

BITS = (3, 4)
FORMS: dict[str, tuple[str, dict[str, object]]] = {
    "uniform, symmetric": ("uniform", {"symmetric": True}),
    "uniform": ("uniform", {}),
    "power_of_two": ("power_of_two", {}),
    "apot": ("apot", {}),
    "post": ("post", {}),
    "power, 1/2": ("power", {}),
    "power, the network's": ("power", {"exponent": 0.0}),
    "power, a layer's": ("power", {"per": "layer"}),
    "power, a row's": ("power", {"per": "row"}),
}


def matrices(streamed: StreamedModel, every: int, rows: int) -> list[Tensor]:
    """Return the matrices of every `every`-th block, of which every `rows`-th row."""
    found = []
    for index, _ in walk_blocks(streamed):
        if index % every == 0:
            names = (f"{streamed.block_name(index)}.{linear}.weight" for linear in streamed.adapter.linears)
            found += [streamed.matrix(name)[::rows].clone() for name in names]
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--group", default="row")
    parser.add_argument("--every", type=int, default=1, help="take every so many blocks")
    parser.add_argument("--rows", type=int, default=1, help="take every so many rows")
    arguments = parser.parse_args()
    weights = matrices(StreamedModel(open_source(arguments.model), "cpu"), arguments.every, arguments.rows)
    group = parse_group_size(arguments.group)
    exponents = {}
    print(f"| levels | {' | '.join(f'{bits} bits' for bits in BITS)} |")
    print("|---" * (len(BITS) + 1) + "|")
    for name, (kind, options) in FORMS.items():
        row = []
        for bits in BITS:
            format = FORMATS.get(kind)(bits=bits, group_size=group, **options)  # type: ignore[call-arg]
            format = format.of_network(lambda: weights)
            assert isinstance(format, GroupFormat)
            if isinstance(format, Power) and "exponent" in options:
                exponents[bits] = format.exponent
            row.append(sum(_error(W, format) for W in weights) / len(weights))
        print(f"| {name} | {' | '.join(f'{error:.4f}' for error in row)} |", flush=True)
    print(f"\nexponents of the network: {exponents}; {len(weights)} matrices")


def _error(W: Tensor, format: GroupFormat) -> float:
    stored = nearest_matrix(format, W, fit_matrix(format, W, None, True))
    return output_error(W, stored.dequantize(), None)


if __name__ == "__main__":
    main()
