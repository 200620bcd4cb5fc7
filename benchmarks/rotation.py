"""Run-time cost of two rotations, as a share of a layer: `python benchmarks/rotation.py`.

For shapes of real layers and for one token and many: the time of rotating inputs and outputs, of the layer that
runs from packed tensors around them, and of a dense float layer of the same shape.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from bitmill.formats.e8 import E8
from bitmill.formats.quantized import Quantized
from bitmill.formats.rotated import Rotated
from bitmill.runtime.modules.linear import QuantLinear

SHAPES = ((576, 576), (1536, 576), (576, 1536), (2048, 2048), (5632, 2048))


def seconds(work: Callable[[], object], rounds: int) -> float:
    """Return the median CPU time, after one round that fills the caches.

    Args:
        work: The function to time.
        rounds: Number of calls.
    """
    work()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times)


def packed_layer(shape: tuple[int, int], kind: str) -> QuantLinear:
    """Return a layer with random codes.

    Args:
        shape: (out, in).
        kind: Name of the format.
    """
    format = Rotated(E8(2), kind)  # type: ignore[arg-type]
    codes = torch.randint(0, 1 << 16, (shape[0], format.codes_in(shape[1])), dtype=torch.int32)
    matrix = Quantized(format, codes, {"scale": torch.full((1, 1), 0.02)}, shape)
    layer = QuantLinear(format, shape, bias=False)
    layer.load_state_dict(matrix.pack())
    return layer


def measured(shape: tuple[int, int], tokens: int, kind: str, rounds: int) -> str:
    """Return one line of the table."""
    rows, columns = shape
    x, y = torch.randn(tokens, columns), torch.randn(tokens, rows)
    dense, layer = torch.nn.Linear(columns, rows, bias=False), packed_layer(shape, kind)
    V, U = layer.format.on_inputs(columns, x.device), layer.format.on_outputs(rows, x.device)
    plain = seconds(lambda: dense(x), rounds)
    turning = seconds(lambda: (V.forward(x), U.inverse(y)), rounds)
    packed = seconds(lambda: layer(x), max(3, rounds // 5))
    times = " ".join(f"{1e6 * t:>7.0f} us" for t in (turning, plain, packed))
    return (
        f"{rows:>5} x{columns:>5} {tokens:>6} {kind:>10} {times} {turning / plain:>7.0%} {turning / packed:>7.1%}"
    )


@torch.no_grad()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("   out x   in tokens      basis  rotations      dense     packed  / dense  / packed")
    for shape in SHAPES:
        for tokens in arguments.tokens:
            for kind in ("hadamard", "orthogonal"):
                print(measured(shape, tokens, kind, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
