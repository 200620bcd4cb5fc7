"""The contract of an engine: what it would refuse, or get wrong, in a quantized model."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from bitmill.config.registry import Registry
from bitmill.exports.base import TARGETS, Layer
from bitmill.formats import Format
from bitmill.formats.permuted import Permuted
from bitmill.formats.quantized_inputs import QuantizedInputs
from bitmill.formats.uniform import Uniform

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # which engines merge into one matrix
BITMILL = "bitmill"


@dataclass(frozen=True)
class Described:
    """A quantized model without its numbers.

    Attributes:
        kind: of the checkpoint, such as "gptq"; "bitmill" for a folder of bitmill.
        layers: the quantized layers by name, embedding and head among them.
        model_type: of the config.
        tied: embedding and head are one matrix.
        settings: `quantization_config` of another program's checkpoint.
    """

    kind: str
    layers: dict[str, Layer]
    model_type: str
    tied: bool
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def inside(self) -> dict[str, Layer]:
        """The layers of the blocks."""
        return {name: layer for name, layer in self.layers.items() if re.search(r"\.\d+\.", name)}


@dataclass(frozen=True)
class Finding:
    """Something that an engine would not load.

    Attributes:
        layer: the first layer concerned; "" for the whole checkpoint.
        reason: one sentence, with what to do.
    """

    layer: str
    reason: str


class Engine(ABC):
    """A program that runs models.

    Attributes:
        name: as of --engine.
        judged: how its rules are known.
        target: the export that it reads best.
    """

    name: ClassVar[str]
    judged: ClassVar[str]
    target: ClassVar[str]

    @abstractmethod
    def findings(self, model: Described) -> Iterator[Finding]:
        """Yield what the engine would not load of another program's checkpoint."""

    def findings_of_folder(self, model: Described) -> Iterator[Finding]:
        """Yield what stands in the way of a folder of bitmill, once it is exported to `target`."""
        target = TARGETS.get(self.target)()
        for name, layer in model.inside.items():
            if reason := target.unsupported_reason(layer):
                yield Finding(name, f"The export to {self.target} cannot hold it: {reason}.")
                return
        exported = Described(self.target, model.inside, model.model_type, model.tied)
        yield from self.findings(exported)


ENGINES: Registry[type[Engine]] = Registry("engine", "bitmill.workflows.lint.engines")


def weight_format(layer: Layer) -> Format:
    """Return the format of a layer's matrix, in order and without that of its inputs."""
    format = layer.format
    while isinstance(format, (QuantizedInputs, Permuted)):
        format = format.inner
    return format


def unequal_fused(model: Described, engine: str) -> Iterator[Finding]:
    """Yield the layers that an engine merges and whose formats differ, or of which some are in float."""
    for name, layer in model.inside.items():
        owner, _, leaf = name.rpartition(".")
        for group in FUSED:
            if leaf != group[0] and (leaf not in group or f"{owner}.{group[0]}" in model.inside):
                continue
            for other in group:
                path = f"{owner}.{other}"
                same = model.inside.get(path)
                if same is None or same.format != layer.format:
                    has = "is in float" if same is None else "has another format"
                    yield Finding(path, f"{engine} merges it with {name}, and it {has}; give both one format.")
                    return


def only_bits(model: Described, engine: str, bits: tuple[int, ...], symmetric: bool = False) -> Iterator[Finding]:
    """Yield the first layer of evenly spaced levels with other bits, or with zeros where they are not read."""
    for name, layer in model.layers.items():
        format = weight_format(layer)
        if not isinstance(format, Uniform):
            continue
        if format.bits not in bits:
            held = ", ".join(map(str, bits))
            yield Finding(name, f"It has {format.bits} bits, and {engine} reads {model.kind} of {held}.")
            return
        if symmetric and not format.symmetric:
            yield Finding(name, f"It has zeros, and {engine} reads {model.kind} without; use symmetric=true.")
            return


def only_groups(model: Described, engine: str, groups: tuple[int, ...]) -> Iterator[Finding]:
    """Yield the first layer whose columns are no whole groups of one of these widths, or one group a row."""
    for name, layer in model.layers.items():
        format = weight_format(layer)
        width = format.core.width(layer.shape)
        if layer.shape[1] % width or (width != layer.shape[1] and width not in groups):
            held = ", ".join(map(str, groups))
            yield Finding(name, f"It has groups of {width} of {layer.shape[1]} columns; {engine} reads {held}.")
            return


def shuffled_groups(model: Described, engine: str) -> Iterator[Finding]:
    """Yield the first layer whose groups are no neighbouring columns."""
    for name, layer in model.layers.items():
        if isinstance(layer.format, Permuted):
            yield Finding(name, f"Its columns are in groups by g_idx (desc_act), which {engine} refuses.")
            return


def tied_head(model: Described, engine: str) -> Iterator[Finding]:
    """Yield a quantized head that is the embedding too."""
    if model.tied and model.kind != "mlx" and (head := next((n for n in model.layers if "head" in n), None)):
        yield Finding(head, f"It is quantized and tied to the embedding, which {engine} reads in float.")
