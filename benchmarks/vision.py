"""Measure AdaLog, its rivals and reconstruction on vision models; write the tables of docs/vision.md.

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb DEB
    python benchmarks/vision.py --package DEB --work WORK --models dinov2-small small-vit small-swin
    python benchmarks/vision.py --work WORK --write      # the tables alone, of what was measured

small-vit and small-swin are folders of `examples/train_small_vit.py`. WORK receives pictures of Fashion-MNIST
(28 x 28, ten kinds of clothes) as PNG files by label: the 10,000 test pictures to measure on, 2,000 of the
training pictures to calibrate on. dinov2-small reads them at `--size` pixels, which fixes the number of patches.
Every model reads the pictures once, and its outputs are kept in WORK, so that differences between methods are
paired. Finished cells are kept there and in benchmarks/results/vision.json: an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

import bitmill
from bitmill.data.pictures import PictureWindows
from bitmill.evaluation.intervals import SEED, bootstrap_means, percentile_interval
from bitmill.evaluation.pictures import labels_of, neighbours_agree
from bitmill.sources import zoo
from bitmill.tasks.base import task_for

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "vision.json"
PAGE, EVIDENCE = ROOT / "docs" / "vision.md", ROOT / "docs" / "evidence.md"
LABELS = ("tshirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
VARIANTS = {  # options of the method, and the name in tables
    "adalog": ({"log": "adalog"}, "adaptive base"),
    "log2": ({"log": "log2"}, "base 2"),
    "log_sqrt2": ({"log": "log_sqrt2"}, "base sqrt(2)"),
    "uniform": ({"log": "uniform"}, "uniform"),
    "adalog-plain": ({"log": "adalog", "reconstruct": "plain"}, "adaptive base, reconstructed"),
    "adalog-fisher": ({"log": "adalog", "reconstruct": "fisher"}, "adaptive base, reconstructed (Fisher)"),
}
RIVALS = ("log2", "log_sqrt2", "uniform")
LIMITS = {
    (8, "adalog"): 0.3,
    (6, "adalog"): 1.0,
    (4, "adalog"): 8.0,
    (4, "adalog-fisher"): 4.0,
    (3, "adalog-fisher"): 18.0,
}
FIGURES = {"top1": "top-1", "knn": "k-NN"}
BATCH = 32
CALIBRATION = 2000  # pictures to calibrate on, of the training part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of pictures, models and finished cells")
    parser.add_argument("--package", type=Path, help="unpacked Debian package, from which pictures are taken")
    parser.add_argument("--models", nargs="+", default=["dinov2-small"], help="names of the zoo, or folders")
    parser.add_argument("--count", type=int, default=5000, help="pictures to measure on, at most 10,000")
    parser.add_argument("--size", type=int, default=56, help="pixels of a side for dinov2-small, a multiple of 14")
    parser.add_argument("--samples", type=int, default=256, help="pictures to calibrate on")
    parser.add_argument("--minutes", type=float, default=60.0, help="of a reconstruction")
    parser.add_argument("--iters", type=int, default=500, help="steps a block of a reconstruction")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 6, 8])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--write", action="store_true", help="write the tables from the results alone")
    arguments = parser.parse_args()
    if not arguments.write:
        for part in ("train", "t10k"):
            unpack(arguments.package, arguments.work, part)
        for model in arguments.models:
            measure(arguments, model)
    write(json.loads(RESULTS.read_text(encoding="utf-8")))


def unpack(package: Path | None, work: Path, part: str) -> None:
    """Write pictures of an unpacked dataset-fashion-mnist as PNG files by label, unless they are there."""
    folder = work / part
    if folder.exists():
        return
    if package is None:
        raise SystemExit(f"{folder} is missing; give --package.")
    arrays = {}
    for kind, header in (("images", 16), ("labels", 8)):
        file = next(package.rglob(f"{part}-{kind}-*"))
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        assert struct.unpack(">I", content[4:8])[0] in (10_000, 60_000)
        arrays[kind] = np.frombuffer(content, np.uint8, offset=header)
    pictures = arrays["images"].reshape(-1, 28, 28)[: CALIBRATION if part == "train" else None]
    partial = work / f"{part}.partial"
    for index, (picture, label) in enumerate(zip(pictures, arrays["labels"])):
        (partial / LABELS[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(partial / LABELS[label] / f"{index}.png")
    partial.rename(folder)


def prepared(arguments: argparse.Namespace, name: str) -> Path:
    """Return the folder of a model; that of the zoo with an image processor for small pictures."""
    if Path(name).is_dir():
        return Path(name)
    folder: Path = arguments.work / f"{name}-{arguments.size}"
    if not folder.exists():
        shutil.copytree(zoo.fetch(name), folder)
        path, side = folder / "preprocessor_config.json", arguments.size
        changed = {"crop_size": {"height": side, "width": side}, "size": {"shortest_edge": side}}
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changed}), encoding="utf-8")
    return folder


def measure(arguments: argparse.Namespace, name: str) -> None:
    """Measure every cell of a model that the results lack."""
    source, key = prepared(arguments, name), Path(name).name
    about = {field: getattr(arguments, field) for field in ("count", "size", "samples", "iters", "minutes")}
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if found.get("about") != about:
        found = {"about": about, "models": {}}
    cells = found["models"].setdefault(key, {"cells": []})
    kept = arguments.work / "outputs" / f"{key}-{'-'.join(map(str, about.values()))}"
    kept.mkdir(parents=True, exist_ok=True)
    windows = PictureWindows(str(arguments.work / "t10k"), AutoImageProcessor.from_pretrained(source))
    labels = labels_of(windows.domains("all", 0, arguments.count))
    if not (kept / "float.pt").exists():
        pictures = windows.held_out("all", 0, arguments.count)
        torch.save(outputs(source, pictures), kept / "float.pt")
    reference = torch.load(kept / "float.pt", weights_only=True)
    cells["float"] = {part: float(right.double().mean()) for part, right in judged(reference, labels).items()}
    for bits in arguments.bits:
        for variant in arguments.variants:
            if bits > 4 and variant not in ("adalog", "uniform"):
                continue
            file = kept / f"{variant}-{bits}.pt"
            if not file.exists():
                pictures = windows.held_out("all", 0, arguments.count)
                torch.save(quantized(arguments, source, bits, variant, pictures), file)
            record = compared(torch.load(file, weights_only=True), reference, labels)
            cells["cells"] = [c for c in cells["cells"] if (c["bits"], c["variant"]) != (bits, variant)]
            cells |= {"float_batch_ms": reference["batch_ms"], "threads": torch.get_num_threads()}
            cells["cells"].append({"bits": bits, "variant": variant, **record})
            print(json.dumps(cells["cells"][-1]), flush=True)
        cells[f"paired-{bits}"] = paired(kept, bits, reference, labels)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def quantized(
    arguments: argparse.Namespace, source: Path, bits: int, variant: str, pictures: Tensor
) -> dict[str, Any]:
    """Quantize a model, and return its outputs, with the seconds of the clock that both took."""
    folder, options = arguments.work / f"out-{source.name}-{variant}-{bits}", dict(VARIANTS[variant][0])
    if "reconstruct" in options:
        options |= {"minutes": arguments.minutes, "iters": arguments.iters}
    calib = bitmill.CalibrationData(str(arguments.work / "train"), samples=arguments.samples)
    started = time.monotonic()
    if not folder.exists():
        bitmill.quantize(
            str(source), "adalog", out=folder, calib=calib, measure=0, bits=bits, act_bits=bits, **options
        )
    seconds = time.monotonic() - started
    found = outputs(folder, pictures)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    shutil.rmtree(folder)
    return {**found, "seconds": seconds, "bytes": size}


@torch.no_grad()
def outputs(folder: Path, pictures: Tensor) -> dict[str, Any]:
    """Return what a model says of pictures: "features" (pictures, width), or "logits" of a classifier.

    "batch_ms" is the time of a batch of 32, of the clock.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    task: Any = task_for(config)
    classifies = task.auto_class_name == AutoModelForImageClassification.__name__
    auto_class = AutoModelForImageClassification if classifies else AutoModel
    model: nn.Module = auto_class.from_pretrained(folder).eval()
    found: list[Tensor] = []
    model(pictures[:BATCH])  # kernels repack matrices at their first call
    began = time.monotonic()
    for batch in pictures.split(BATCH):
        output = model(batch)[0]
        pooled = output if output.dim() == 2 else output.mean(1) if task.pooling == "mean" else output[:, 0]
        found.append(pooled.float())
    name = "logits" if classifies else "features"
    return {name: torch.cat(found), "batch_ms": 1e3 * (time.monotonic() - began) / len(found)}


def judged(found: dict[str, Any], labels: Tensor) -> dict[str, Tensor]:
    """Return which pictures a model gets right: "knn" by nearest neighbours, "top1" of a classifier."""
    values = found["logits"] if "logits" in found else found["features"]
    right = {"knn": neighbours_agree(torch.nn.functional.normalize(values, dim=-1), labels)}
    if "logits" in found:
        right["top1"] = values.argmax(-1) == labels
    return right


def similarity(found: dict[str, Any], reference: dict[str, Any]) -> Tensor:
    """Return the cosine of every picture's features, or logits, to those of the float model."""
    name = "logits" if "logits" in found else "features"
    return torch.nn.functional.cosine_similarity(found[name], reference[name], dim=-1)


def compared(found: dict[str, Any], reference: dict[str, Any], labels: Tensor) -> dict[str, Any]:
    """Return the figures of a cell."""
    record: dict[str, Any] = {"cosine": interval(similarity(found, reference))}
    exact = judged(reference, labels)
    for name, right in judged(found, labels).items():
        record[name] = float(right.double().mean())
        record[f"{name}_change"] = interval(right.double() - exact[name].double())
    return record | {name: found[name] for name in ("seconds", "batch_ms", "bytes")}


def paired(kept: Path, bits: int, reference: dict[str, Any], labels: Tensor) -> dict[str, Any]:
    """Return figures of the adaptive base less those of each rival, paired by picture."""
    files = {variant: kept / f"{variant}-{bits}.pt" for variant in ("adalog", *RIVALS)}
    found = {variant: torch.load(file, weights_only=True) for variant, file in files.items() if file.exists()}
    if "adalog" not in found:
        return {}
    own, cosine = judged(found["adalog"], labels), similarity(found["adalog"], reference)
    return {
        rival: {
            "cosine": interval(cosine - similarity(found[rival], reference)),
            **{
                name: interval(own[name].double() - right.double())
                for name, right in judged(found[rival], labels).items()
            },
        }
        for rival in RIVALS
        if rival in found
    }


def interval(values: Tensor) -> list[float]:
    """Return the mean of values, and the ends of its 95 % bootstrap interval over pictures."""
    means = bootstrap_means(list(values.double()[:, None]), np.random.default_rng(SEED))
    return [float(values.double().mean()), *percentile_interval(means)]


def write(found: dict[str, Any]) -> None:
    """Write the tables of the page, and the rows of docs/evidence.md."""
    begin, end = "<!-- vision:begin -->\n", "\n<!-- vision:end -->"
    page, table = PAGE.read_text(encoding="utf-8"), tabulate(found)
    page = re.sub(rf"{begin}.*?{end.strip()}", lambda _: begin + table + end, page, flags=re.DOTALL)
    PAGE.write_text(page, encoding="utf-8")
    lines = EVIDENCE.read_text(encoding="utf-8").split("\n")
    lines = [line for line in lines if not line.startswith("| AdaLog |")]
    end_of_claims = lines.index("## Experiments") - 1
    lines[end_of_claims:end_of_claims] = evidence(found)
    EVIDENCE.write_text("\n".join(lines), encoding="utf-8")


def tabulate(found: dict[str, Any]) -> str:
    """Return settings and cells as Markdown."""
    about, lines = found["about"], list[str]()
    for name, model in found["models"].items():
        own = "top1" if "top1" in model["float"] else "knn"
        figures = sorted(model["float"].items(), reverse=True)
        exact = ", ".join(f"{FIGURES[figure]} {share:.1%}" for figure, share in figures)
        size = f" at {about['size']} x {about['size']} pixels" if name == "dinov2-small" else ""
        lines += [
            f"`{name}`{size} on {about['count']:,} test pictures of Fashion-MNIST, calibrated on "
            f"{about['samples']} training pictures, reconstructed in {about['iters']} steps a block. The float "
            f"model: {exact}. Points less float and differences to the adaptive base are of {FIGURES[own]}, with "
            f"95 % intervals over pictures. A batch of {BATCH} takes it {model['float_batch_ms']:.0f} ms, with "
            f"{model['threads']} threads. Written by `benchmarks/vision.py`.",
            "",
            f"| bits | behind softmax and GELU | cosine | {FIGURES[own]} | less float, points "
            "| adaptive base is better by | s to quantize | ms a batch | MB |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for cell in sorted(model["cells"], key=lambda c: (-c["bits"], list(VARIANTS).index(c["variant"]))):
            rival = model.get(f"paired-{cell['bits']}", {}).get(cell["variant"])
            against = points(rival[own]) if rival else "-"
            lines.append(
                f"| W{cell['bits']}A{cell['bits']} | {VARIANTS[cell['variant']][1]} | {cell['cosine'][0]:.4f} | "
                f"{cell[own]:.1%} | {points(cell[f'{own}_change'])} | {against} | {cell['seconds']:.0f} | "
                f"{cell['batch_ms']:.0f} | {cell['bytes'] / 1e6:.1f} |"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def points(change: list[float]) -> str:
    """Return a difference of shares in points, with its interval."""
    mean, low, high = (100 * value for value in change)
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def evidence(found: dict[str, Any]) -> list[str]:
    """Return the rows of docs/evidence.md, with verdicts that follow from the cells."""
    paper, rows = "([2407.12951](https://arxiv.org/abs/2407.12951)", []
    for name, model in found["models"].items():
        own = "top1" if "top1" in model["float"] else "knn"
        at = f"[N](#n-a-vision-transformer): `{name}`, {found['about']['count']:,} pictures"
        cells = {(cell["bits"], cell["variant"]): cell for cell in model["cells"]}
        for bits in (4, 3):
            rivals = model.get(f"paired-{bits}", {})
            if len(rivals) < len(RIVALS):
                continue
            above = {kind: sum(rival[kind][1] > 0 for rival in rivals.values()) for kind in ("cosine", own)}
            below = sum(rival[own][2] < 0 for rival in rivals.values())
            verdict = (
                "reproduced"
                if set(above.values()) == {len(RIVALS)}
                else "in part"
                if any(above.values())
                else "not reproduced"
            )
            gains = [f"over {VARIANTS[rival][1]} {points(of[own])} points" for rival, of in rivals.items()]
            rows.append(
                "| AdaLog | an adaptive base beats base 2, base sqrt(2) and uniform levels behind softmax and "
                f"GELU {paper}, tables 1 and 5) | {at}, W{bits}A{bits}; {FIGURES[own]}, paired | "
                f"{'; '.join(gains)} | "
                f"{verdict}: above {above[own]} of {len(RIVALS)} in {FIGURES[own]} and {above['cosine']} in "
                f"cosine, below {below} |"
            )
        for (bits, variant), within in LIMITS.items():
            if cell := cells.get((bits, variant)):
                change = [100 * value for value in cell[f"{own}_change"]]
                verdict = (
                    "reproduced"
                    if change[1] >= -within
                    else "not reproduced"
                    if change[2] < -within
                    else "undecided"
                )
                rows.append(
                    f"| AdaLog | W{bits}A{bits}, {VARIANTS[variant][1]}, is within {within:g} points of float "
                    f"{paper}, table 1) | {at}, {FIGURES[own]} | {points(cell[f'{own}_change'])} points, cosine "
                    f"{cell['cosine'][0]:.4f} | {verdict} |"
                )
    rows.append(
        f"| AdaLog | top-1 on ImageNet, detection and segmentation {paper}, tables 1 to 3) | | no package has the "
        "models and labelled sets | not testable here |"
    )
    return rows


if __name__ == "__main__":
    main()
