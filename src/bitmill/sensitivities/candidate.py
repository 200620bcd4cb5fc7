"""Units of a model, and the schemes that each of them may get."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bitmill.formats import Format
from bitmill.models.streamed import StreamedModel
from bitmill.numerics.statistics import Statistics
from bitmill.recipes.scheme import LayerScheme
from bitmill.solvers.base import solve_stacked

FLOAT_LABEL = "float"
KEYS_VALUES = -2  # the index of the block of units that are keys and values


@dataclass(frozen=True)
class Candidate:
    """A scheme that a unit may get.

    Attributes:
        label: its name for people, such as "gptq bits=3".
        scheme: None leaves the layers in float.
        pair: of keys and values, the bits of both; None for weights.
    """

    label: str
    scheme: LayerScheme | None = None
    pair: tuple[int, int] | None = None

    @property
    def format(self) -> Format | None:
        """The stored format; None for float."""
        return None if self.scheme is None else self.scheme.format

    @cached_property
    def key(self) -> str:
        """A digest of the scheme, by which measured costs are kept."""
        plain: Any = self.pair
        if self.scheme is not None:
            transforms = [transform.to_dict() for transform in self.scheme.transforms]
            plain = [self.scheme.weight.to_dict(), self.scheme.solver.to_dict(), transforms]
            if self.scheme.inputs is not None:
                plain.append(self.scheme.inputs.to_dict())
        return _digest(plain)

    @cached_property
    def inputs_key(self) -> str | None:
        """A digest of the format of inputs alone, by which its cost is kept; None where they are not rounded."""
        inputs = None if self.scheme is None else self.scheme.inputs
        return None if inputs is None else _digest(["inputs", inputs.to_dict()])

    @cached_property
    def weights(self) -> Candidate:
        """The candidate without its format of inputs."""
        if self.scheme is None or self.scheme.inputs is None:
            return self
        return replace(self, scheme=replace(self.scheme, inputs=None))


def _digest(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Unit:
    """Layers that have one format: linears of a block that engines fuse, or one layer alone.

    Attributes:
        layers: full names.
        block: index of their block; NON_BLOCK for embedding and head, KEYS_VALUES for keys and values of a layer.
    """

    layers: tuple[str, ...]
    block: int

    @property
    def name(self) -> str:
        """The full name of the first layer, and the last parts of the others."""
        return "+".join([self.layers[0], *(layer.rpartition(".")[2] for layer in self.layers[1:])])


def block_units(streamed: StreamedModel) -> list[Unit]:
    """Return the units of all blocks in order: the groups of layers that engines fuse, and every other layer."""
    units = []
    for index in range(len(streamed.blocks)):
        fused = streamed.fused_layers(index)
        seen: set[str] = set()
        for site in streamed.sites(index):
            group = next((group for group in fused if site.layer in group), (site.layer,))
            if site.layer not in seen:
                units.append(Unit(group, index))
                seen |= set(group)
    return units


@torch.no_grad()
def solve_unit(
    matrices: dict[str, Tensor],
    stats: dict[str, Statistics],
    leads: Sequence[str],
    scheme: LayerScheme,
    fisher: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Return the decoded weights of a unit that a scheme quantizes on the float model's statistics.

    Args:
        matrices: path of a linear in its block -> weight, fp32 (out, in).
        stats: path -> statistics of its inputs.
        leads: first linear of the stage of each matrix; matrices of one stage are solved together.
        scheme: the scheme.
        fisher: path -> Fisher diagonal; empty where the scheme does not need it.
    """
    decoded: dict[str, Tensor] = {}
    for lead in dict.fromkeys(leads):
        names = [name for name, own in zip(matrices, leads) if own == lead]
        known = stats[lead]
        if "cross" in scheme.needs and known.gram is not None:
            known = replace(known, cross=torch.zeros_like(known.gram))  # the inputs are the float model's
        if fisher:
            known = replace(known, fisher=torch.cat([fisher[name] for name in names]))
        known = known.restrict(scheme.needs)
        solved = solve_stacked(scheme.solver, [matrices[name] for name in names], known, scheme.format)
        decoded |= {name: quantized.dequantize() for name, quantized in zip(names, solved)}
    return {name: decoded[name] for name in matrices}
