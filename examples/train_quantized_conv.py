"""Train a small convolutional net on labelled pictures of clothes in several formats, at 4, 3 and 2 bits.

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb DEB
    python examples/train_quantized_conv.py DEB results.jsonl --seeds 0 1 2 3 4

For every seed a float net is trained, and then, from its weights, one net for each method and number of bits, all
on equally many pictures in the same order: powers of two (pot), sums of them (apot), powers of the square root of
two (post) and even steps (lsq) for weights alone, and even steps for weights and inputs with one scale a layer
(lsq_inputs) or a factor for every patch (asq). The first convolution and the head stay in float. Each net is
packed and measured as it runs, on the 10,000 test pictures. A result is one line of the file; lines that are there
are not made again. The table at the end has mean and standard deviation over seeds, and operations of a weight.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from train_small_vit import load

import bitmill

BATCH = 64
FLOAT = ["0=float", "14=float"]  # stem and head
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "pot": ("power_of_two", {}),
    "apot": ("apot", {}),
    "post": ("post", {}),
    "lsq": ("rtn", {"symmetric": True}),
    "lsq_inputs": ("asq", {"adaptive": False, "symmetric": False}),
    "asq": ("asq", {"symmetric": False}),
}
LEAST_BITS = {"apot": 3}


def main() -> None:
    """Train what is missing in the file of results, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="unpacked Debian package dataset-fashion-mnist")
    parser.add_argument("results", type=Path, help="file of results, one JSON object a line")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--float-count", type=int, default=60_000, help="pictures of the float net's training")
    parser.add_argument("--count", type=int, default=12_000, help="pictures of each further training")
    parser.add_argument("--test-count", type=int, default=10_000)
    given = parser.parse_args()
    train_set = load(given.package, "train")
    test_set = tuple(part[: given.test_count] for part in load(given.package, "t10k"))
    for seed in given.seeds:
        run_seed(seed, given, train_set, test_set)
    print(table(read(given.results)))


def net() -> nn.Sequential:
    """Return four convolutions, the second and the fourth with a stride of 2, and a classifier."""
    layers: list[nn.Module] = []
    for before, after, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2)):
        layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*layers)


def run_seed(seed: int, given: argparse.Namespace, train_set: Any, test_set: Any) -> None:
    """Train the nets of a seed whose results are missing."""
    known = {(line["seed"], line["method"], line["bits"]) for line in read(given.results)}
    wanted = [(m, b) for b in given.bits for m in METHODS if b >= LEAST_BITS.get(m, 1)]
    missing = [case for case in wanted if (seed, *case) not in known]
    if not missing:
        return
    torch.manual_seed(seed)
    trained = net()
    train(trained, train_set, given.float_count, 3e-3, seed)
    if (seed, "float", 32) not in known:
        write(given.results, seed, "float", 32, accuracy(trained, *test_set), 0.0)
    again = copy.deepcopy(trained)  # the float net with as much further training as the others
    train(again, train_set, given.count, 1e-3, seed + 1000)
    if (seed, "float, trained on", 32) not in known:
        write(given.results, seed, "float, trained on", 32, accuracy(again, *test_set), 0.0)
    calibration = [pixels(part) for part in train_set[0][:256].split(BATCH)]
    for name, bits in missing:
        started = time.process_time()
        method, options = METHODS[name]
        model = copy.deepcopy(trained)
        inputs = {"act_bits": bits} if method == "asq" else {}
        bitmill.prepare_qat(
            model, method, calib=calibration, rules=FLOAT, bits=bits, group_size="row", **inputs, **options
        )
        train(model, train_set, given.count, 1e-3, seed + 1000)
        found = accuracy(bitmill.convert_qat(model), *test_set)
        write(given.results, seed, name, bits, found, time.process_time() - started)


def pixels(pictures: Tensor) -> Tensor:
    """Return pictures as the net reads them, (n, 1, 28, 28) in -1 to 1."""
    return (pictures.float() / 127.5 - 1)[:, None]


def train(model: nn.Module, data: tuple[Tensor, Tensor], count: int, rate: float, seed: int) -> None:
    """Train on so many pictures, mirrored at random, with AdamW and a cosine.

    Scales and other parameters of formats have learning rates in units of their root mean square.
    """
    pictures, labels = data
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for name, parameter in model.named_parameters():
        of_format = name.rpartition(".")[2] not in ("weight", "bias")
        unit = float(parameter.detach().square().mean().sqrt()) if of_format else 1.0
        groups.append({"params": [parameter], "lr": rate * unit, "weight_decay": 0.0 if of_format else 1e-4})
    optimizer = torch.optim.AdamW(groups)
    batches = list(torch.randperm(len(labels), generator=generator)[:count].split(BATCH))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    model.train()
    for batch in batches:
        x = pixels(pictures[batch])
        mirrored = torch.rand(len(x), generator=generator) < 0.5
        x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        nn.functional.cross_entropy(model(x), labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, pictures: Tensor, labels: Tensor) -> float:
    """Return the share of pictures whose largest logit is their class's."""
    model.eval()
    found = [model(pixels(part)).argmax(-1) for part in pictures.split(500)]
    return float((torch.cat(found) == labels).double().mean())


def read(path: Path) -> list[dict[str, Any]]:
    """Return the results of a file; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write(path: Path, seed: int, method: str, bits: int, found: float, seconds: float) -> None:
    """Append a result."""
    line = {"seed": seed, "method": method, "bits": bits, "accuracy": found, "cpu_s": round(seconds, 1)}
    with path.open("a") as file:
        print(json.dumps(line), file=file)
    print(f"seed {seed}  {method} {bits} bits: {found:.2%}, {seconds:.0f} CPU s", flush=True)


def table(results: list[dict[str, Any]]) -> str:
    """Return accuracies and operations as Markdown."""
    lines = [
        "| method | bits | top-1, mean and deviation over seeds | operations of a weight |",
        "|---|---|---|---|",
    ]
    for method, bits in dict.fromkeys((line["method"], line["bits"]) for line in results):
        found = [line["accuracy"] for line in results if (line["method"], line["bits"]) == (method, bits)]
        deviation = statistics.stdev(found) if len(found) > 1 else 0.0
        kinds = ", ".join(operations(method, bits))
        lines.append(
            f"| {method} | {bits} | {statistics.mean(found):.2%}, {deviation:.2%} ({len(found)}) | {kinds} |"
        )
    return "\n".join(lines)


def operations(method: str, bits: int) -> Iterator[str]:
    """Yield operations that a weight takes in each product, as the papers count: those of scales left out."""
    if method in ("pot", "post"):
        yield "1 shift"
        yield (
            "1 addition"
            if method == "pot"
            else "1 addition, and 1 multiplication by sqrt(1/2) of a sum of odd powers"
        )
    elif method == "apot":
        terms = -(-(bits - 1) // 2)
        yield f"{terms} shifts, {terms} additions" if terms > 1 else "1 shift, 1 addition"
    else:
        yield "1 multiplication, 1 addition"


if __name__ == "__main__":
    main()
