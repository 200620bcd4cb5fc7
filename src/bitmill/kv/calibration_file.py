"""Calibrated parameters of all layers, and their file: kv.safetensors in a model's folder.

Its tensors are layers.N.keys.scale and so on; its metadata hold the method with its options and the calibration
text.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from bitmill.config.documents import load_json
from bitmill.errors import CheckpointError, UsageError
from bitmill.files import write_tensors
from bitmill.kv.codec import CalibratedParams, calibrated_shapes
from bitmill.kv.scheme import KV_METHODS, KVMethod

FILE = "kv.safetensors"
_META = "bitmill_kv"
_TENSORS = ("keys", "values")


@dataclass(frozen=True)
class KVCalibration:
    """A KV method and the calibrated parameters of every layer.

    Attributes:
        method: with its options.
        layers: parameters of the keys and of the values of each layer.
        about: plain data on the calibration (text, windows, seconds).
    """

    method: KVMethod
    layers: tuple[tuple[CalibratedParams, CalibratedParams], ...]
    about: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Return all parameters by name."""
        tensors: dict[str, Tensor] = {}
        for number, layer in enumerate(self.layers):
            for name, params in zip(_TENSORS, layer, strict=True):
                for part in fields(params):
                    value = getattr(params, part.name)
                    if value is not None:
                        tensors[f"layers.{number}.{name}.{part.name}"] = value.contiguous()
        return tensors

    @property
    def bytes(self) -> int:
        """Return the bytes of its tensors in fp32, independent of the tokens of a cache."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def save(self, folder: Path) -> Path:
        """Write kv.safetensors into a folder; return its path."""
        write_tensors(folder / FILE, self.tensors(), self.metadata())
        return folder / FILE

    def check(self, shapes: dict[int, tuple[int, int]]) -> None:
        """Raise an error unless all parameters fit a model.

        Args:
            shapes: layer index -> (heads, head dimension).

        Raises:
            CheckpointError: a layer or a parameter is missing, or has another shape.
        """
        scheme = self.method.scheme()
        if not scheme.is_calibrated:
            return
        if len(self.layers) <= max(shapes):
            raise CheckpointError(
                f"Keys and values of {len(self.layers)} layers were calibrated, and the model has "
                f"{max(shapes) + 1}; calibrate this model."
            )
        for number, (heads, dim) in shapes.items():
            for name, tensor_scheme, params in zip(
                _TENSORS, (scheme.keys, scheme.values), self.layers[number], strict=True
            ):
                expected = calibrated_shapes(tensor_scheme, heads * dim, self.method.uses_gradients)
                _check_shapes(f"{name} of layer {number}", params, expected)

    def metadata(self) -> dict[str, str]:
        """Return the metadata of the file."""
        meta = {"method": self.method.to_dict(), "layers": len(self.layers), "about": self.about}
        return {_META: json.dumps(meta)}


def _check_shapes(where: str, params: CalibratedParams, expected: dict[str, tuple[int, ...]]) -> None:
    for part in fields(params):
        value, needed = getattr(params, part.name), expected.get(part.name)
        shape = None if value is None else tuple(value.shape)
        if shape != needed:
            raise CheckpointError(
                f"The calibrated {part.name} of the {where} has the shape {shape}, and {needed} is needed; "
                "calibrate this model again."
            )


def read_calibration(folder: Path) -> KVCalibration | None:
    """Return the calibration in a folder, None where there is none. Raise CheckpointError for a damaged file."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            meta = load_json((file.metadata() or {})[_META])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        method = KV_METHODS.from_dict(meta["method"])
        layers = params_by_layer(tensors, meta["layers"])
    except Exception as error:  # safetensors and json raise many types
        raise CheckpointError(f"{path} cannot be read ({error}); quantize the model again.") from error
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"The tensor {name!r} of {path} holds NaN or Inf; quantize again.")
    return KVCalibration(method, layers, meta["about"])


def load_calibration(model: Any) -> KVCalibration | None:
    """Return the calibration in the folder that a model was loaded from, None where there is none."""
    folder = getattr(model, "name_or_path", "") or ""
    return read_calibration(Path(folder)) if folder else None


def matching_calibration(method: KVMethod, found: KVCalibration | None, name: str) -> KVCalibration | None:
    """Return the calibration of a method, None for a method that needs none.

    Args:
        method: KV method.
        found: calibration of the model's folder, if there is one.
        name: of the model, for the error message.

    Raises:
        UsageError: the method needs a calibration and `found` is not one for it; the message has the command that
            calibrates the model.
    """
    if not method.scheme().is_calibrated:
        return None
    if found is None or found.method != method:
        present = "none" if found is None else f"one for {found.method.describe()}"
        raise UsageError(
            f"{method.describe()} needs a calibration, and {name} has {present}; "
            f"make one by {_calibration_command(method, name, found)}."
        )
    return found


def _calibration_command(method: KVMethod, name: str, found: KVCalibration | None) -> str:
    """Return the command that calibrates a model.

    Options that the command would otherwise take from the folder's calibration are named even at their defaults.
    """
    assumed = [type(method)()]
    if found is not None and found.method.name == method.name:
        assumed.append(found.method)
    own = [(f.name, getattr(method, f.name)) for f in fields(method) if f.name != "bits"]
    changed = [(key, value) for key, value in own if any(getattr(other, key) != value for other in assumed)]
    options = "".join(
        f" --kv-set {key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in changed
    )
    start = f"bitmill quantize {shlex.quote(name)} --method none --kv {method.name} --kv-bits {method.bits}"
    return f"{start}{options} -o DIR"


def params_by_layer(
    tensors: dict[str, Tensor], count: int
) -> tuple[tuple[CalibratedParams, CalibratedParams], ...]:
    """Return the inverse of `KVCalibration.tensors`.

    Args:
        tensors: parameters by name.
        count: number of layers.

    Returns:
        Parameters of the keys and of the values of each layer.
    """

    def params(number: int, name: str) -> CalibratedParams:
        prefix = f"layers.{number}.{name}"
        return CalibratedParams(**{p.name: tensors.get(f"{prefix}.{p.name}") for p in fields(CalibratedParams)})

    return tuple((params(number, "keys"), params(number, "values")) for number in range(count))
