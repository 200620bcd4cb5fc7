"""Measure AdaLog and its rivals on dinov2-small; write the table of docs/vision.md and rows of docs/evidence.md.

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
RESULTS = ROOT / "benchmarks" / "results" / "vision.json"
PAGE, EVIDENCE = ROOT / "docs" / "vision.md", ROOT / "docs" / "evidence.md"
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
    parser.add_argument("--log-bits", type=int, default=0, help="bits behind softmax and GELU alone")
    parser.add_argument("--logs", nargs="+", default=list(LOGS), choices=list(LOGS))
    parser.add_argument("--write", action="store_true", help="write the page from the results alone")
    arguments = parser.parse_args()
    if arguments.unpack:
        unpack(arguments.unpack, arguments.pictures)
    if not arguments.write:
        measure(arguments)
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    table = tabulate(found)
    begin, end = "<!-- vision:begin -->\n", "\n<!-- vision:end -->"
    page = PAGE.read_text(encoding="utf-8")
    page = re.sub(rf"{begin}.*?{end.strip()}", lambda _: begin + table + end, page, flags=re.DOTALL)
    PAGE.write_text(page, encoding="utf-8")
    lines = EVIDENCE.read_text(encoding="utf-8").split("\n")
    lines = [line for line in lines if not line.startswith("| AdaLog |")]
    end_of_claims = lines.index("## Experiments") - 1
    lines[end_of_claims:end_of_claims] = evidence(found)
    EVIDENCE.write_text("\n".join(lines), encoding="utf-8")


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
    done = {(cell["bits"], cell["log"], cell["log_bits"]) for cell in found["cells"]}
    with tempfile.TemporaryDirectory() as scratch:
        model = resized_model(Path(scratch) / "model", arguments.size)
        windows = PictureWindows(str(arguments.pictures), AutoImageProcessor.from_pretrained(model))
        pictures = windows.held_out("eval", 0, arguments.count)
        labels = windows.domains("eval", 0, arguments.count)
        reference = outputs(AutoModel.from_pretrained(model), pictures)
        for bits in arguments.bits:
            for log in (log for log in arguments.logs if (bits, log, arguments.log_bits) not in done):
                started = time.process_time()
                folder = Path(scratch) / f"{log}-{bits}"
                options = {"bits": bits, "act_bits": bits, "log": log, "solver": arguments.solver}
                options["log_bits"] = arguments.log_bits
                calib = bitmill.CalibrationData(str(arguments.pictures), samples=arguments.samples)
                bitmill.quantize(str(model), "adalog", out=folder, calib=calib, measure=0, **options)
                quantized = time.process_time() - started
                own = outputs(AutoModel.from_pretrained(folder), pictures)
                metric = PictureMetrics()
                metric.add(pictures, own, reference)
                key = {"bits": bits, "log": log, "log_bits": arguments.log_bits}
                cell = {**key, **metric.result(labels), "cpu_s": round(quantized, 1)}
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
    seconds = [cell["cpu_s"] for cell in cells]
    lines = [
        f"`dinov2-small` at {about['size']} x {about['size']} pixels on {pictures} of the 10,000 test pictures of "
        f"Fashion-MNIST (part `eval`), calibrated on {about['samples']} others, weights rounded by "
        f"`{about['solver']}`, without reconstruction. The float model finds the label of {accuracy:.1%} of the "
        f"pictures from their nearest neighbours. It took {min(seconds):.0f} to {max(seconds):.0f} s of one "
        "processor to quantize. Written by `benchmarks/vision.py`.",
        "",
        "| bits | behind softmax and GELU | cosine | k-NN | less float, points | 95 % interval | same neighbour |",
        "|---|---|---|---|---|---|---|",
    ]
    kinds = sorted({(cell["bits"], cell["log_bits"]) for cell in cells}, reverse=True)
    for bits, log_bits in kinds:
        title = f"W{bits}A{bits}" + (f", {log_bits} bits behind softmax and GELU" if log_bits else "")
        for log, name in LOGS.items():
            for cell in (c for c in cells if (c["bits"], c["log"], c["log_bits"]) == (bits, log, log_bits)):
                low, high = (100 * end for end in cell["knn_change_interval"])
                neighbour = f"{cell['neighbour_agreement']:.1%}"
                lines.append(
                    f"| {title} | {name} | {cell['cosine_similarity']:.4f} | {cell['knn_accuracy']:.1%} | "
                    f"{100 * cell['knn_change']:+.1f} | {low:+.1f} to {high:+.1f} | {neighbour} |"
                )
    return "\n".join(lines)


def evidence(found: dict[str, Any]) -> list[str]:
    """Return the rows of docs/evidence.md, with verdicts that follow from the cells."""
    cells = {(cell["bits"], cell["log_bits"], cell["log"]): cell for cell in found["cells"]}
    pictures = found["cells"][0]["pictures"]
    at = f"[N](#n-a-vision-transformer): {pictures} pictures"
    paper = "([2407.12951](https://arxiv.org/abs/2407.12951)"
    rows = []
    for bits, log_bits in ((8, 3), (4, 0), (3, 0)):
        of = {log: cells[bits, log_bits, log] for log in LOGS if (bits, log_bits, log) in cells}
        if len(of) < len(LOGS):
            continue
        rivals = [cell for log, cell in of.items() if log != "adalog"]
        cosine = sum(of["adalog"]["cosine_similarity"] > rival["cosine_similarity"] for rival in rivals)
        labels = sum(of["adalog"]["knn_accuracy"] > rival["knn_accuracy"] for rival in rivals)
        reproduced = "reproduced" if cosine == labels == len(rivals) else "in part" if cosine else "not reproduced"
        figures = [
            f"{LOGS[log]} {c['cosine_similarity']:.3f} and {c['knn_accuracy']:.1%}" for log, c in of.items()
        ]
        sites = f"{log_bits} bits there, 8 everywhere else" if log_bits else f"W{bits}A{bits}"
        rows.append(
            "| AdaLog | an adaptive base beats base 2, base sqrt(2) and uniform levels behind softmax and GELU "
            f"{paper}, tables 1 and 5) | {at}, {sites}; cosine of features and k-NN | {'; '.join(figures)} | "
            f"{reproduced}: above {cosine} of {len(rivals)} in cosine and {labels} in labels, whose intervals are "
            f"about {width(of['adalog']):.0f} points wide |"
        )
    for bits, within in ((8, 0.3), (6, 1.0)):
        if (bits, 0, "adalog") in cells:
            cell = cells[bits, 0, "adalog"]
            change = 100 * cell["knn_change"]
            low, high = (100 * end for end in cell["knn_change_interval"])
            decided = "reproduced" if low >= -within else "not reproduced" if high < -within else "undecided"
            rows.append(
                f"| AdaLog | W{bits}A{bits} is within {within} points of float {paper}, table 1) | {at}, k-NN | "
                f"{change:+.1f} points ({low:+.1f} to {high:+.1f}), cosine {cell['cosine_similarity']:.4f} | "
                f"{decided}{'' if decided != 'undecided' else ' with so few pictures'} |"
            )
    rows.append(
        f"| AdaLog | top-1 on ImageNet, detection and segmentation {paper}, tables 1 to 3) | | no package has the "
        "models and labelled sets | not testable here |"
    )
    return rows


def width(cell: dict[str, Any]) -> float:
    """Return the width of the interval of a cell's k-NN change, in points."""
    low, high = cell["knn_change_interval"]
    return 100 * float(high - low)


if __name__ == "__main__":
    main()
