"""Keys and values as somebody asks for them, and as results and sentences name them."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field, fields
from typing import Any

from bitmill.config.parsing import part_of, value_of
from bitmill.errors import CalibrationError, UsageError
from bitmill.kv.calibration_file import KVCalibration
from bitmill.kv.scheme import KV_METHODS, KVMethod, kv_method

SAMPLES = 16
FLOAT = "none"  # the KV method that is none


@dataclass(frozen=True)
class KVConfig:
    """What is asked for: a KV method by name, with its bits and options, and how much text calibrates it.

    bits, options: what is left out is as in the folder, if that has a calibration for this method, else the
        method's default. Strings are read as in YAML.
    seqlen: None for 2048 tokens, or as many as the model reads.
    """

    name: str
    bits: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    samples: int = SAMPLES
    seqlen: int | None = None

    def method(self, found: KVCalibration | None = None) -> KVMethod:
        """The method itself. Raises RecipeError."""
        given = {k: value_of(v) if isinstance(v, str) else v for k, v in self.options.items()}
        if self.bits is not None:
            if "bits" in given:
                raise UsageError(f"'bits' of {self.name} is given twice, as {self.bits} and {given['bits']}.")
            given["bits"] = self.bits
        if found is not None and found.method.name == self.name:
            given = {**{f.name: getattr(found.method, f.name) for f in fields(found.method)}, **given}
        return kv_method(self.name, **given)


def parse_kv_config(
    name: str | None,
    bits: int | None,
    options: dict[str, Any] | None,
    samples: int = SAMPLES,
    seqlen: int | None = None,
) -> KVConfig | None:
    """The arguments of a function as one object, None where no method is named. Raises UsageError.

    name: of a method, or NAME:key=value,... with options.
    """
    if name is None:
        if bits is not None or options:
            raise UsageError("Bits or options of a KV method are given without a method; name it with --kv.")
        return None
    options = options or {}
    if name != FLOAT:
        part = part_of(KV_METHODS, name)
        name = part.pop(KV_METHODS.noun)
        if twice := next((key for key in part if key in options or (key == "bits" and bits is not None)), None):
            raise UsageError(f"{twice!r} of {name} is given twice, with the method and apart; give it once.")
        options = {**part, **options}
    if samples < 1:
        raise CalibrationError(f"--kv-samples is {samples}; use at least 1 window to calibrate keys and values.")
    return KVConfig(name, bits, options, samples, seqlen)


def summary(method: KVMethod) -> dict[str, Any]:
    """A method and its options as the results of commands have them."""
    return {
        "kv_method": method.name,
        "kv_options": {f.name: getattr(method, f.name) for f in fields(method)},
    }


def describe(method: KVMethod) -> str:
    """A method and its options that are not as by default, in words."""
    default = type(method)()
    changed = [f.name for f in fields(method) if getattr(method, f.name) != getattr(default, f.name)]
    more = "".join(f", {name} {getattr(method, name)}" for name in changed if name != "bits")
    return f"{method.name} at {method.bits} bits{more}"


def calibration_command(method: KVMethod, name: str, found: KVCalibration | None = None) -> str:
    """The command that calibrates a model for this very method.

    found: what lies in the model's folder; options that it has otherwise are named even as by default.
    """
    assumed = [type(method)()]
    if found is not None and found.method.name == method.name:
        assumed.append(found.method)
    own = [(f.name, getattr(method, f.name)) for f in fields(method) if f.name != "bits"]
    told = [(key, value) for key, value in own if any(getattr(other, key) != value for other in assumed)]
    given = "".join(
        f" --kv-set {key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in told
    )
    start = f"bitmill quantize {shlex.quote(name)} --method none --kv {method.name} --kv-bits {method.bits}"
    return f"{start}{given} -o DIR"
