"""Measure AdaLog and its rivals on dinov2-small, and write docs/vision.md's table.

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb DEB
    python benchmarks/vision.py --pictures FOLDER --unpack DEB      # hours on one thread, fewer with --count
    python benchmarks/vision.py --pictures FOLDER --write           # the table alone, of what was measured

FOLDER receives the 10,000 test pictures of Fashion-MNIST (28 x 28, ten kinds of clothes) as PNG files by label.
The model reads them at `--size` pixels, which fixes the number of patches. Calibrated on pictures of the part
"calib" and measured on those of "eval". Finished cells are kept in benchmarks/results/vision.json, so an
interrupted run goes on.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import shutil
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel

import bitmill
from bitmill.data.pictures import PictureWindows
from bitmill.evaluation.pictures import PictureMetrics
from bitmill.sources import zoo

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "vision.json", ROOT / "docs" / "vision.md"
LABELS = ("tshirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
LOGS = {"adalog": "adaptive base", "log2": "base 2", "log_sqrt2": "base sqrt(2)", "uniform": "uniform"}
BITS = (4, 3, 8, 6)
BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True, help="folder of labelled pictures")
    parser.add_argument(
        "--unpack", type=Path, help="unpacked Debian package, from which the folder is filled first"
    )
    parser.add_argument("--count", type=int, default=2000, help="pictures to measure on")
    parser.add_argument("--size", type=int, default=84, help="pixels of a side, a multiple of 14")
    parser.add_argument("--samples", type=int, default=32, help="pictures to calibrate on")
    parser.add_argument("--solver", default="nearest", help="how weights are rounded, nearest or gptq")
    parser.add_argument("--bits", type=int, nargs="+", default=list(BITS))
    parser.add_argument("--logs", nargs="+", default=list(LOGS), choices=list(LOGS))
    parser.add_argument("--write", action="store_true", help="write the page from the results alone")
    arguments = parser.parse_args()
    if arguments.unpack:
        unpack(arguments.unpack, arguments.pictures)
    if not arguments.write:
        measure(arguments)
    table = tabulate(json.loads(RESULTS.read_text(encoding="utf-8")))
    begin, end = "<!-- vision:begin -->\n", "\n<!-- vision:end -->"
    page = PAGE.read_text(encoding="utf-8")
    page = re.sub(rf"{begin}.*?{end.strip()}", lambda _: begin + table + end, page, flags=re.DOTALL)
    PAGE.write_text(page, encoding="utf-8")


def unpack(package: Path, folder: Path) -> None:
    """Write the test pictures of an unpacked dataset-fashion-mnist as PNG files by label."""
    arrays = {}
    for kind, magic in (("images", 16), ("labels", 8)):
        file = next(package.rglob(f"t10k-{kind}-*"))
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        assert struct.unpack(">I", content[4:8])[0] == 10_000
        arrays[kind] = np.frombuffer(content, np.uint8, offset=magic)
    for index, (picture, label) in enumerate(zip(arrays["images"].reshape(-1, 28, 28), arrays["labels"])):
        (folder / LABELS[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / LABELS[label] / f"{index}.png")


def resized_model(folder: Path, size: int) -> Path:
    """Copy dinov2-small with an image processor that gives pictures of `size` x `size` pixels."""
    shutil.copytree(zoo.fetch("dinov2-small"), folder)
    path = folder / "preprocessor_config.json"
    changed = {"crop_size": {"height": size, "width": size}, "size": {"shortest_edge": size}}
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changed}), encoding="utf-8")
    return folder


def measure(arguments: argparse.Namespace) -> None:
    """Measure every cell that the results lack."""
    about = {name: getattr(arguments, name) for name in ("count", "size", "samples", "solver")}
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if found.get("about") != about:
        found = {"about": about, "cells": []}
    done = {(cell["bits"], cell["log"]) for cell in found["cells"]}
    with tempfile.TemporaryDirectory() as scratch:
        model = resized_model(Path(scratch) / "model", arguments.size)
        windows = PictureWindows(str(arguments.pictures), AutoImageProcessor.from_pretrained(model))
        pictures = windows.held_out("eval", 0, arguments.count)
        labels = windows.domains("eval", 0, arguments.count)
        reference = outputs(AutoModel.from_pretrained(model), pictures)
        for bits in arguments.bits:
            for log in (log for log in arguments.logs if (bits, log) not in done):
                started = time.process_time()
                folder = Path(scratch) / f"{log}-{bits}"
                options = {"bits": bits, "act_bits": bits, "log": log, "solver": arguments.solver}
                calib = bitmill.CalibrationData(str(arguments.pictures), samples=arguments.samples)
                bitmill.quantize(str(model), "adalog", out=folder, calib=calib, measure=0, **options)
                quantized = time.process_time() - started
                own = outputs(AutoModel.from_pretrained(folder), pictures)
                metric = PictureMetrics()
                metric.add(pictures, own, reference)
                cell = {"bits": bits, "log": log, **metric.result(labels), "cpu_s": round(quantized, 1)}
                found["cells"].append(cell)
                RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                print(json.dumps(cell), flush=True)
                shutil.rmtree(folder)


@torch.no_grad()
def outputs(model: nn.Module, pictures: Tensor) -> Tensor:
    """Return the class tokens of pictures, (pictures, 1, width)."""
    return torch.cat([model.eval()(batch).last_hidden_state[:, :1] for batch in pictures.split(BATCH)])


def tabulate(found: dict[str, Any]) -> str:
    """Return settings and cells as Markdown."""
    about, cells = found["about"], found["cells"]
    pictures, accuracy = cells[0]["pictures"], cells[0]["reference_knn_accuracy"]
    lines = [
        f"`dinov2-small` at {about['size']} x {about['size']} pixels on {pictures} of the 10,000 test pictures of "
        f"Fashion-MNIST (part `eval`), calibrated on {about['samples']} others, weights rounded by "
        f"`{about['solver']}`, without reconstruction. The float model finds the label of {accuracy:.1%} of the "
        "pictures from their nearest neighbours. Written by `benchmarks/vision.py`.",
        "",
        "| bits | behind softmax and GELU | cosine | k-NN | less float, points | 95 % interval | same neighbour |",
        "|---|---|---|---|---|---|---|",
    ]
    for bits in sorted({cell["bits"] for cell in cells}, reverse=True):
        for log, name in LOGS.items():
            for cell in (cell for cell in cells if (cell["bits"], cell["log"]) == (bits, log)):
                low, high = (100 * end for end in cell["knn_change_interval"])
                neighbour = f"{cell['neighbour_agreement']:.1%}"
                lines.append(
                    f"| W{bits}A{bits} | {name} | {cell['cosine_similarity']:.4f} | {cell['knn_accuracy']:.1%} | "
                    f"{100 * cell['knn_change']:+.1f} | {low:+.1f} to {high:+.1f} | {neighbour} |"
                )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
