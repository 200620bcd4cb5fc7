"""One stream through an LSTM layer, a token at a time: packed weights against torch's nn.LSTM in float32.

    python benchmarks/lstm_decode.py                    # a minute; let the machine do nothing else
    python benchmarks/lstm_decode.py --hidden 1024 --recipes power_of_two:2 rtn:4

All have the same random weights, before rounding, and take turns; medians of one run. nn.LSTM runs with oneDNN,
which rearranges the weights in every call, and without; ratios are over the faster one. A row counts only where
the outputs are those of the decoded weights.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import bitmill
from bitmill.recurrent.config import LstmConfig
from bitmill.recurrent.convert import load_layers
from bitmill.recurrent.layer import LstmLayer
from bitmill.recurrent.model import LstmForCausalLM

TOKENS, TURNS = 32, 7
FLOATS = ("float32, nn.LSTM", "float32, nn.LSTM without oneDNN")
TOLERANCE = 2e-2  # of the outputs' largest magnitude: inputs of a token are rounded to int8 in small groups


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument(
        "--recipes", nargs="+", default=["power_of_two:2", "rtn:2", "rtn:4"], metavar="METHOD:BITS"
    )
    arguments = parser.parse_args()
    table = Table(
        "hidden", "weights", "ms a token", "over the faster nn.LSTM", "largest difference from decoded weights"
    )
    for hidden in arguments.hidden:
        for row in rows(hidden, arguments.recipes):
            table.add_row(*row)
    Console().print(table)
    print(f"{torch.get_num_threads()} threads")


def rows(hidden: int, recipes: list[str]) -> list[tuple[str, ...]]:
    """Return the rows of a width, torch's first."""
    torch.manual_seed(0)
    lstm = nn.LSTM(hidden, hidden, batch_first=True)
    x = torch.randn(1, TOKENS, hidden)
    steps: dict[str, Callable[[], Tensor]] = {
        name: partial(stream_float, lstm, x, name == FLOATS[0]) for name in FLOATS
    }
    differences: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "float"
        save(lstm, source)
        for recipe in recipes:
            method, _, bits = recipe.partition(":")
            out = Path(folder) / recipe.replace(":", "-")
            bitmill.quantize(str(source), method, bits=int(bits), out=out, measure=0, progress=False)
            packed, decoded = layer_of(out), layer_of(out, dense=True)
            differences[recipe] = difference(stream(packed, x), stream(decoded, x))
            steps[recipe] = partial(stream, packed, x)
    times = {name: [] for name in steps}
    for _ in range(TURNS + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            times[name].append((time.perf_counter() - began) / TOKENS * 1e3)
    medians = {name: median(values[1:]) for name, values in times.items()}
    base = min(medians[name] for name in FLOATS)
    found = []
    for name, value in medians.items():
        off = differences.get(name)
        sound = off is None or off < TOLERANCE
        shown = f"{base / value:.2f} x" if sound else "wrong"
        found.append((str(hidden), name, f"{value:.3f}", shown, "" if off is None else f"{off:.1e}"))
    return found


def save(lstm: nn.LSTM, folder: Path) -> None:
    """Write a language model around a layer of torch."""
    hidden = lstm.hidden_size
    model = LstmForCausalLM(
        LstmConfig(vocab_size=64, embedding_size=hidden, hidden_size=hidden, num_hidden_layers=1)
    )
    load_layers(model.model.layers, lstm)
    model.save_pretrained(folder)


def layer_of(folder: Path, dense: bool = False) -> LstmLayer:
    """Load the layer of a folder."""
    layer = bitmill.load(str(folder), dense=dense).eval().model.layers[0]
    assert isinstance(layer, LstmLayer)
    return layer


def stream(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the outputs of tokens that arrive one by one."""
    state, outputs = None, []
    for token in x.unbind(1):
        output, state = layer(token[:, None], state)
        outputs.append(output)
    return torch.cat(outputs, 1)


def stream_float(lstm: nn.LSTM, x: Tensor, with_onednn: bool) -> Tensor:
    """Return the outputs of torch's layer."""
    with torch.backends.mkldnn.flags(enabled=with_onednn):
        return stream(lstm, x)


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest magnitude."""
    return float((found - expected).abs().max() / expected.abs().max())


if __name__ == "__main__":
    main()
