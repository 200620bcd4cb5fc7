"""Checkpoints of safetensors in which other programs store quantized layers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from bitmill.errors import UsageError
from bitmill.exports.base import Layer, Target
from bitmill.files import write_json, write_tensors
from bitmill.workflows.export.job import ExportJob, Writer, check_equal

SHARD_BYTES = 4 << 30


class PackedWriter(Writer):
    """Writes the tensors of a target."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.name, self.readers, self.ending = target.name, target.readers, f"-{target.name}"

    def check(self, job: ExportJob) -> dict[str, Layer]:
        """Return the layers of the blocks."""
        layers = job.layers(self.name, self.target.unsupported_reason)
        if reason := self.target.mixed_reason(layers):
            raise UsageError(
                f"{job.checkpoint.folder} cannot be one {self.name} checkpoint: {reason}, or --to dense."
            )
        return layers

    def write(self, job: ExportJob, layers: dict[str, Layer], out: Path) -> list[str]:
        """Write shards, index and config."""
        _write_shards(self._tensors(job, layers), out)
        described = self.target.config(layers, [name for name in job.linears if name not in layers])
        config = {k: v for k, v in job.checkpoint.config.items() if k not in ("quantization_config", "dtype")}
        config |= {"dtype": str(job.dtype).removeprefix("torch."), **self.target.config_entries(described)}
        write_json(out / "config.json", config)
        for file, document in self.target.files(described).items():
            write_json(out / file, document)
        return self.target.notes(layers)

    def _tensors(self, job: ExportJob, layers: dict[str, Layer]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors by name."""
        job.progress.start("export", len(layers))
        for name, quantized in job.quantized():
            if name not in layers:
                yield f"{name}.weight", job.in_float(f"{name}.weight", quantized.dequantize())
                continue
            tensors = self.target.tensors(quantized)
            check_equal(name, self.target.decode(tensors, layers[name]), quantized, self.name)
            yield from ((f"{name}.{part}", tensor) for part, tensor in tensors.items())
            job.progress.advance()
        job.progress.finish()
        for name, tensor in job.floats():
            yield name, job.in_float(name, tensor)


def _write_shards(tensors: Iterator[tuple[str, Tensor]], out: Path) -> None:
    """Write tensors in shards of SHARD_BYTES, each as soon as it is full, and an index where there are several."""
    shard: dict[str, Tensor] = {}
    index: dict[str, int] = {}
    count = size = total = 0

    def close() -> None:
        nonlocal count, size
        count += 1
        write_tensors(out / f"shard-{count}", shard)
        index.update(dict.fromkeys(shard, count))
        shard.clear()
        size = 0

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            close()
        shard[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    close()
    files = {number: f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)}
    if count == 1:
        files = {1: "model.safetensors"}
    for number, file in files.items():
        (out / f"shard-{number}").rename(out / file)
    if count > 1:
        weight_map = {name: files[number] for name, number in sorted(index.items())}
        document = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(out / "model.safetensors.index.json", document)
