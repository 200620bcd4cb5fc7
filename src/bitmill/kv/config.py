"""The KV option: a method, its options and its calibration text, parsed once."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from bitmill.config.parsing import parse_part, parse_value
from bitmill.errors import CalibrationError, UsageError
from bitmill.kv.calibration_file import KVCalibration
from bitmill.kv.scheme import KV_METHODS, KVMethod, kv_method

SAMPLES = 16
FLOAT = "none"  # name in place of a KV method: an ordinary cache


@dataclass(frozen=True)
class KVConfig:
    """A KV method by name, with the options that were given, and the amount of text it is calibrated on.

    Attributes:
        name: of the method, or "none" for an ordinary cache.
        bits: bits of a code; None where not given.
        options: further options that were given. Strings are read as YAML.
        samples: windows of calibration text.
        seqlen: tokens of a window; None for 2048, or the model's maximum if that is less.
    """

    name: str
    bits: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    samples: int = SAMPLES
    seqlen: int | None = None

    def method(self, calibration: KVCalibration | None = None) -> KVMethod:
        """Return the method.

        Args:
            calibration: that of the model's folder: options that were not given are taken from it if it is of this
                method, else they have the method's defaults.

        Raises:
            RecipeError: the method or an option is unknown, or options contradict each other.
            UsageError: bits are given twice.
        """
        given = {k: parse_value(v) if isinstance(v, str) else v for k, v in self.options.items()}
        if self.bits is not None:
            if "bits" in given:
                raise UsageError(f"'bits' of {self.name} is given twice, as {self.bits} and {given['bits']}.")
            given["bits"] = self.bits
        if calibration is not None and calibration.method.name == self.name:
            given = {**{f.name: getattr(calibration.method, f.name) for f in fields(calibration.method)}, **given}
        return kv_method(self.name, **given)

    def with_bits(self, bits: int) -> KVConfig:
        """Return this configuration at another bit width."""
        options = {key: value for key, value in self.options.items() if key != "bits"}
        return replace(self, bits=bits, options=options)


def parse_kv_config(
    method: str | None,
    bits: int | None = None,
    options: dict[str, Any] | None = None,
    samples: int = SAMPLES,
    seqlen: int | None = None,
) -> KVConfig | None:
    """Return the arguments of a command or function as one object.

    Args:
        method: name of a KV method, or NAME:key=value,... with options.
        bits: bits of a code.
        options: further options of the method.
        samples: windows of calibration text.
        seqlen: tokens of a window.

    Returns:
        Configuration, None where no method is named.

    Raises:
        UsageError: an option is given twice, or bits or options without a method.
        CalibrationError: there are no windows to calibrate on.
        RecipeError: the method or an option is unknown.
    """
    if method is None:
        if bits is not None or options:
            given = f"--kv-bits is {bits}" if bits is not None else "Options of a KV method are given"
            names = ", ".join(KV_METHODS.names())
            raise UsageError(f"{given} and no method is named; give --kv, one of {names}.")
        return None
    name, options = method, options or {}
    if name != FLOAT:
        part = parse_part(KV_METHODS, name)
        name = part.pop(KV_METHODS.noun)
        if twice := next((key for key in part if key in options or (key == "bits" and bits is not None)), None):
            raise UsageError(
                f"{twice!r} of {name} is given twice, with the method and as an option; give it once."
            )
        options = {**part, **options}
    if samples < 1:
        raise CalibrationError(f"--kv-samples is {samples}; use at least 1 window to calibrate keys and values.")
    return KVConfig(name, bits, options, samples, seqlen)
