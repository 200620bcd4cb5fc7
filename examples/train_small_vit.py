"""Train a small ViT or Swin on labelled pictures of clothes, as a classifier whose top-1 accuracy can be measured.

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb DEB
    python examples/train_small_vit.py DEB small-vit --model vit --epochs 5
    python examples/train_small_vit.py DEB small-swin --model swin --epochs 5

The 60,000 training pictures of Fashion-MNIST (28 x 28, ten kinds) train it, the 10,000 test pictures measure it.
The folder is an ordinary model: `bitmill quantize small-vit --method adalog --calib PICTURES` reads it, and
`benchmarks/vision.py --models small-vit` measures it. Order and weights are seeded. After every epoch the state is
kept, and an interrupted run goes on from there. An epoch takes about 7 minutes of a processor for the ViT and 10
for the Swin; `--minutes` ends training before an epoch that would exceed them.
"""

from __future__ import annotations

import argparse
import gzip
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

LABELS = ("tshirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
SIZE = 28
BATCH = 128
HEADER = {"images": 16, "labels": 8}  # bytes of an idx file


def main() -> None:
    """Train, measure and save a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="unpacked Debian package dataset-fashion-mnist")
    parser.add_argument("out", type=Path, help="folder of the model")
    parser.add_argument("--model", choices=sorted(MODELS), default="vit")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=110.0, help="of a clock")
    parser.add_argument("--rate", type=float, default=1e-3, help="largest learning rate")
    parser.add_argument("--count", type=int, default=60_000, help="pictures to train on")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    model = MODELS[arguments.model]()
    train(model, arguments)
    pictures, labels = load(arguments.package, "t10k")
    print(f"top-1 of {len(labels):,} test pictures: {accuracy(model, pictures, labels):.1%}", flush=True)
    model.save_pretrained(arguments.out)
    processor().save_pretrained(arguments.out)


def vit() -> PreTrainedModel:
    """Return a ViT of six blocks on 49 patches."""
    return ViTForImageClassification(
        ViTConfig(
            **classes(),
            image_size=SIZE,
            patch_size=4,
            hidden_size=128,
            num_hidden_layers=6,
            num_attention_heads=4,
            intermediate_size=512,
        )
    )


def swin() -> PreTrainedModel:
    """Return a Swin of two stages, on 14 x 14 and on 7 x 7 patches."""
    return SwinForImageClassification(
        SwinConfig(
            **classes(),
            image_size=SIZE,
            patch_size=2,
            embed_dim=64,
            depths=[2, 4],
            num_heads=[2, 4],
            window_size=7,
            drop_path_rate=0.0,
        )
    )


MODELS = {"vit": vit, "swin": swin}


def classes() -> dict[str, dict[int, str] | dict[str, int]]:
    """Return the classes in the order of sorted subfolders."""
    names = sorted(LABELS)
    return {"id2label": dict(enumerate(names)), "label2id": {name: k for k, name in enumerate(names)}}


def processor() -> ViTImageProcessor:
    """Return the processor that makes the pictures of `load` from files."""
    return ViTImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def load(package: Path, part: str) -> tuple[Tensor, Tensor]:
    """Return pictures (n, 28, 28), uint8, and their classes.

    Args:
        package: the unpacked package.
        part: "train" or "t10k".
    """
    arrays = {}
    for kind, header in HEADER.items():
        file = next(package.rglob(f"{part}-{kind}-*"))
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        arrays[kind] = torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).copy())
    order = torch.tensor([sorted(LABELS).index(name) for name in LABELS])
    return arrays["images"].view(-1, SIZE, SIZE), order[arrays["labels"].long()]


def pixels(pictures: Tensor) -> Tensor:
    """Return pictures as the model reads them, (n, 3, 28, 28) in -1 to 1."""
    return (pictures.float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)


def train(model: PreTrainedModel, arguments: argparse.Namespace) -> None:
    """Train a model with AdamW, pictures mirrored at random, a warm-up and a cosine."""
    pictures, labels = (part[: arguments.count] for part in load(arguments.package, "train"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.rate, weight_decay=0.05)
    steps = -(-len(labels) // BATCH) * arguments.epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, arguments.rate, total_steps=steps, pct_start=max(0.1, 2 / steps)
    )
    state = arguments.out / "training.pt"
    first = 0
    if state.exists():
        kept = torch.load(state, weights_only=False)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        schedule.load_state_dict(kept["schedule"])
        first = kept["epoch"]
    arguments.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    for epoch in range(first, arguments.epochs):
        started = time.monotonic()
        loss = train_epoch(model, pictures, labels, optimizer, schedule, arguments.seed + epoch)
        torch.save(
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "epoch": epoch + 1,
            },
            state,
        )
        seconds = time.monotonic() - started
        print(f"epoch {epoch + 1}: loss {loss:.3f}, {seconds:.0f} s", flush=True)
        if time.monotonic() - began + seconds > 60 * arguments.minutes:
            break
    state.unlink(missing_ok=True)


def train_epoch(
    model: PreTrainedModel,
    pictures: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    seed: int,
) -> float:
    """Train on every picture once; return the mean loss."""
    generator = torch.Generator().manual_seed(seed)
    model.train()
    total = 0.0
    for batch in torch.randperm(len(labels), generator=generator).split(BATCH):
        x = pixels(pictures[batch])
        mirrored = torch.rand(len(x), generator=generator) < 0.5
        x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        loss = nn.functional.cross_entropy(model(x).logits, labels[batch], label_smoothing=0.1)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        total += float(loss.detach()) * len(batch)
    return total / len(labels)


@torch.no_grad()
def accuracy(model: PreTrainedModel, pictures: Tensor, labels: Tensor) -> float:
    """Return the share of pictures whose largest logit is their class's."""
    model.eval()
    found = [model(pixels(part)).logits.argmax(-1) for part in pictures.split(BATCH)]
    return float((torch.cat(found) == labels).double().mean())


if __name__ == "__main__":
    main()
