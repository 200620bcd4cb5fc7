"""How the inputs of linear layers are rounded: a format, and where its scales come from.

inputs: {format: uniform, bits: 8}                                       a scale a token, symmetric
inputs: {format: uniform, bits: 8, group_size: 64}                       a scale for 64 columns of a token
inputs: {format: uniform, bits: 8, group_size: tensor, static: true}     one scale, from calibration
inputs: {format: float, element: e4m3}
inputs: {format: nvfp4, simulated: true}                                 a scale for 16 columns, as NVFP4 has them
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from bitmill.config.options import check_types
from bitmill.config.parsing import parse_part
from bitmill.errors import RecipeError
from bitmill.formats import FORMATS, Format, GroupFormat, Wrapper

FLOAT: Literal["float"] = "float"  # in place of a format: nothing is rounded
# in addition to those of the format
_OPTIONS = {"static": False, "simulated": False, "threshold": 0.0, "search": False, "adaptive": False}


@dataclass(frozen=True)
class Inputs:
    """The format of a layer's inputs.

    Attributes:
        format: of the inputs as a matrix (tokens, columns); group_size "row" is a scale a token.
        static: one scale from calibration in place of those of each call.
        simulated: also where no kernel multiplies such inputs as they are stored.
        threshold: columns with an input of this magnitude stay in float; 0 for none.
        search: scales of least error of the inputs, with static of the outputs, in place of those for the largest.
        adaptive: with static, a factor of the scale for each token, from its mean magnitude.
    """

    format: Format
    static: bool = False
    simulated: bool = False
    threshold: float = 0.0
    search: bool = False
    adaptive: bool = False

    def __post_init__(self) -> None:
        check_types(self, "inputs")

    def around(self, weight: Format) -> Format:
        """Return the weight format for a matrix whose core multiplies such inputs."""
        if isinstance(weight, Wrapper):
            return replace(weight, inner=self.around(weight.inner))
        quantized: Format = self._quantized(weight)
        return quantized

    def _quantized(self, weight: Format) -> Any:
        chosen = {name: getattr(self, name) for name in _OPTIONS}
        return FORMATS.get("quantized_inputs")(weight, self.format, **chosen)  # type: ignore[call-arg]

    def unsupported_reason(self, weight: Format) -> str | None:
        """Return why no kernel multiplies such inputs with a matrix as both are stored; None where one does."""
        if self.simulated or self._quantized(weight.core).multiplies_as_stored:
            return None
        return (
            f"no kernel multiplies inputs in {self.format.name!r} with weights in {weight.core.name!r} as they "
            "are stored; add simulated=true to the inputs, or --simulate, to round them and multiply in floats."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; `from_dict` is its inverse."""
        chosen = {
            name: getattr(self, name) for name, default in _OPTIONS.items() if getattr(self, name) != default
        }
        return {**self.format.to_dict(), **chosen}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Inputs:
        """Build from the data of a format, and static, simulated and threshold.

        Raises:
            RecipeError: an unknown format or option, or a value of another type.
        """
        chosen = {name: data.get(name, default) for name, default in _OPTIONS.items()}
        own = {key: value for key, value in data.items() if key not in _OPTIONS}
        return cls(input_format(own), **chosen)


def input_format(data: dict[str, Any]) -> Format:
    """Build a format of numbers that layers or attention multiply.

    Args:
        data: of the format. `bits` defaults to 8 or what the format has, `group_size` to "row" or to the columns
            that the format's standard fixes, `symmetric` to true.

    Raises:
        RecipeError: an unknown format or option, a value of another type, or a group_size other than the
            standard's.
    """
    name = data.get("format")
    kind = FORMATS.get(name) if isinstance(name, str) else Format
    if not issubclass(kind, GroupFormat):
        format: Format = FORMATS.from_dict(data)
        return format
    fixed = kind.standard_group
    defaults = {"bits": kind.default_bits(data), "group_size": fixed or "row", "symmetric": True}
    known = FORMATS.options(str(name))
    format = FORMATS.from_dict({**{k: v for k, v in defaults.items() if k in known}, **data})
    if fixed is not None and format.core.group_size != fixed:
        raise RecipeError(
            f"group_size is {format.core.group_size!r}, and {name} has a scale for {fixed} columns of a token; "
            "leave group_size out."
        )
    return format


def parse_inputs(spelled: str) -> Inputs | None:
    """Parse NAME, NAME:key=value,... or float as on the command line; None for float.

    Raises:
        RecipeError: an unknown format or option.
    """
    return None if spelled == FLOAT else Inputs.from_dict(parse_part(FORMATS, spelled, extra=_OPTIONS))
