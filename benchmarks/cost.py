"""Write the README's table of what quantizing takes: minutes and memory by size of the model and method.

    python benchmarks/cost.py --cache FOLDER                      # half an hour, 16 GB in FOLDER
    python benchmarks/cost.py --cache FOLDER --sizes 135M 1.1B    # minutes, 2 GB

All figures are estimates of `bitmill quantize --estimate`, of trials on this machine; let it do nothing else.
benchmarks/estimate.py compares such estimates with runs.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from estimate import call
from memory import LLAMA_7B, TINYLLAMA, checkpoint

README = Path(__file__).parent.parent / "README.md"
BITS, SAMPLES, SEQLEN = 3, 16, 512
METHODS = ("rtn", "gptq", "gptqt", "pvq")
SIZES = {"135M": None, "1.1B": (22, TINYLLAMA), "7B": (32, LLAMA_7B)}  # of random weights: blocks and their shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder of the models with random weights")
    parser.add_argument("--sizes", nargs="+", default=[*SIZES], choices=[*SIZES])
    arguments = parser.parse_args()
    lines = [f"| | {' | '.join(f'`{method}`' for method in METHODS)} |", "|---" * (len(METHODS) + 1) + "|"]
    for size in arguments.sizes:
        blocks = SIZES[size]
        model = "smollm2-135m" if blocks is None else str(checkpoint(arguments.cache, *blocks))
        cells = [cell(model, method) for method in METHODS]
        lines.append(f"| {size} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    begin, end = "<!-- cost:begin -->\n", "\n<!-- cost:end -->"
    text = re.sub(
        rf"{begin}.*?{end}", lambda _: begin + "\n".join(lines) + end, README.read_text(), flags=re.DOTALL
    )
    README.write_text(text, encoding="utf-8")


def cell(model: str, method: str) -> str:
    """Return the time and peak memory of quantizing a model, from an estimate."""
    options = {"model": model, "method": method, "bits": BITS, "samples": SAMPLES, "seqlen": SEQLEN}
    found = call("estimate", options)
    return f"{duration(found['seconds'])}, {found['peak_memory_bytes'] / 1e9:.1f} GB"


def duration(seconds: float) -> str:
    """Return seconds with a unit, two digits."""
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    main()
