"""What calibration found for all layers, and the file it is kept in: kv.safetensors in a model's folder.

Its tensors are layers.N.keys.scale and so on, its metadata the method with its options and what it was found on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bitmill.errors import CheckpointError
from bitmill.kv.codec import CalibratedParams, calibrated_shapes
from bitmill.kv.scheme import KV_METHODS, KVMethod

FILE = "kv.safetensors"
_META = "bitmill_kv"
_SIDES = ("keys", "values")


@dataclass(frozen=True)
class KVCalibration:
    """A method, and for every layer what was found for its keys and its values.

    about: plain data on how it was found (text, tokens, seconds).
    """

    method: KVMethod
    layers: tuple[tuple[CalibratedParams, CalibratedParams], ...]
    about: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that was found, by name."""
        tensors: dict[str, Tensor] = {}
        for number, layer in enumerate(self.layers):
            for side, found in zip(_SIDES, layer, strict=True):
                for part in fields(found):
                    value = getattr(found, part.name)
                    if value is not None:
                        tensors[f"layers.{number}.{side}.{part.name}"] = value.contiguous()
        return tensors

    @property
    def bytes(self) -> int:
        """What its tensors take, in fp32; it grows with nothing."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def save(self, folder: Path) -> Path:
        """Write kv.safetensors; returns its path."""
        save_file(self.tensors(), folder / FILE, metadata=self.metadata())
        return folder / FILE

    def check(self, shapes: dict[int, tuple[int, int]]) -> None:
        """Raises CheckpointError unless all is there for layers with these (heads, dim), by number."""
        if not self.method.scheme().is_calibrated:
            return
        if len(self.layers) <= max(shapes):
            raise CheckpointError(
                f"Keys and values of {len(self.layers)} layers were calibrated, and the model has "
                f"{max(shapes) + 1}; calibrate this model."
            )
        sides = (self.method.scheme().keys, self.method.scheme().values)
        for number, (heads, dim) in shapes.items():
            for name, side, found in zip(_SIDES, sides, self.layers[number], strict=True):
                expected = calibrated_shapes(side, heads * dim, self.method.weighs_errors)
                for part in fields(found):
                    value, wanted = getattr(found, part.name), expected.get(part.name)
                    shape = None if value is None else tuple(value.shape)
                    if shape != wanted:
                        raise CheckpointError(
                            f"What was calibrated as {part.name} of the {name} of layer {number} has the shape "
                            f"{shape}, and {wanted} is needed; calibrate this model again."
                        )

    def metadata(self) -> dict[str, str]:
        """What the file says beside its tensors."""
        meta = {"method": self.method.to_dict(), "layers": len(self.layers), "about": self.about}
        return {_META: json.dumps(meta)}


def read_calibration(folder: Path) -> KVCalibration | None:
    """What `save` wrote into the folder, or None. Raises CheckpointError when the file is damaged."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {})[_META])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        method = KV_METHODS.from_dict(meta["method"])
        layers = calibrated_layers(tensors, meta["layers"])
    except Exception as error:  # safetensors and json raise all sorts
        raise CheckpointError(f"{path} cannot be read ({error}); quantize the model again.") from error
    return KVCalibration(method, layers, meta["about"])


def calibrated_layers(
    tensors: dict[str, Tensor], count: int
) -> tuple[tuple[CalibratedParams, CalibratedParams], ...]:
    """What `KVCalibration.tensors` gave of so many layers."""

    def side(number: int, name: str) -> CalibratedParams:
        return CalibratedParams(
            **{p.name: tensors.get(f"layers.{number}.{name}.{p.name}") for p in fields(CalibratedParams)}
        )

    return tuple((side(number, "keys"), side(number, "values")) for number in range(count))
