"""Rules: which layers get which scheme.

A recipe is an ordered list of rules and defaults; the first rule whose pattern matches a layer's name decides. A
rule overrides the weight format, the inputs, the solver or the transforms of the recipe, or keeps its layers in
float:

    rules:
    - {sites: "*.o_proj", weight: float}
    - {sites: "*.down_proj", weight: {format: uniform, bits: 8}, solver: {solver: nearest}}
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from bitmill.config.parsing import parse_part
from bitmill.errors import RecipeError
from bitmill.formats import FORMATS, Format
from bitmill.recipes.inputs import FLOAT, Inputs, parse_inputs
from bitmill.recipes.scheme import LayerScheme
from bitmill.solvers import SOLVERS, Solver
from bitmill.transforms import TRANSFORMS, Transform


@dataclass(frozen=True)
class Rule:
    """A pattern of layer names and what it overrides.

    Attributes:
        sites: a glob pattern of whole layer names, such as "*.down_proj" or "model.layers.0.*".
        weight: the weight format, "float" to leave the layers as they are, or None for the recipe's.
        solver: the solver, or None for the recipe's.
        transforms: the transforms, or None for the recipe's.
        inputs: how inputs are rounded, "float" to leave them as they are, or None for the recipe's.
        optional: the rule may match no layer, which is refused otherwise: methods name layers of several
            architectures.
    """

    sites: str
    weight: Format | Literal["float"] | None = None
    solver: Solver | None = None
    transforms: tuple[Transform, ...] | None = None
    inputs: Inputs | Literal["float"] | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.sites, str) or not self.sites:
            raise RecipeError(
                f"A rule has the sites {self.sites!r}; give a pattern of layer names, such as '*.o_proj'."
            )
        others = (self.solver, self.transforms, self.inputs)
        if self.is_float and any(part is not None for part in others):
            raise RecipeError(
                f"The rule {self.sites!r} keeps its layers in float and has a solver, transforms or inputs."
            )
        if self.weight is None and all(part is None for part in others):
            raise RecipeError(
                f"The rule {self.sites!r} changes nothing; give it a format, inputs, solver, transforms or float."
            )

    @property
    def is_float(self) -> bool:
        """True where the layers stay in float."""
        return isinstance(self.weight, str)

    def matches(self, layer: str) -> bool:
        """Return True if the pattern matches the name of a layer."""
        return fnmatchcase(layer, self.sites)

    def scheme(self, default: LayerScheme) -> LayerScheme | None:
        """Return the scheme of the layers this rule decides, or None where they stay in float.

        Args:
            default: the recipe's scheme, which fills in everything the rule leaves out.
        """
        if isinstance(self.weight, str):
            return None
        return LayerScheme(
            self.weight or default.weight,
            self.solver or default.solver,
            default.transforms if self.transforms is None else self.transforms,
            default.inputs if self.inputs is None else (None if self.inputs == FLOAT else self.inputs),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; `from_dict` is its inverse."""
        data: dict[str, Any] = {"sites": self.sites}
        if self.weight is not None:
            data["weight"] = self.weight if isinstance(self.weight, str) else self.weight.to_dict()
        if self.solver is not None:
            data["solver"] = self.solver.to_dict()
        if self.transforms is not None:
            data["transforms"] = [t.to_dict() for t in self.transforms]
        if self.inputs is not None:
            data["inputs"] = self.inputs if isinstance(self.inputs, str) else self.inputs.to_dict()
        if self.optional:
            data["optional"] = True
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Rule:
        """Build a rule from plain data with the keys sites, weight, solver, transforms, inputs and optional.

        Raises:
            RecipeError: a part is unknown or has a wrong option.
        """
        weight, solver, transforms = data.get("weight"), data.get("solver"), data.get("transforms")
        inputs = data.get("inputs")
        for key, value in (("weight", weight), ("inputs", inputs)):
            if isinstance(value, str) and value != FLOAT:
                raise RecipeError(
                    f"The rule {data['sites']!r} has the {key} {value!r}; use float, or a format such as "
                    "{format: uniform, bits: 8}."
                )
        return cls(
            data["sites"],
            weight if weight is None or weight == FLOAT else FORMATS.from_dict(weight),
            None if solver is None else SOLVERS.from_dict(solver),
            None if transforms is None else tuple(TRANSFORMS.from_dict(t) for t in transforms),
            inputs if inputs is None or inputs == FLOAT else Inputs.from_dict(inputs),
            bool(data.get("optional")),
        )


def parse_rule(text: str, default: Format) -> Rule:
    """Parse `PATTERN=FORMAT`, `PATTERN=FORMAT:key=value,...` or `PATTERN=float`, as on the command line.

    `@INPUTS` behind the format, or in its place, names the format of the inputs, or float.

    Args:
        text: the rule, such as "*.down_proj=uniform:bits=8".
        default: the recipe's weight format; a format without bits takes its bits.

    Raises:
        RecipeError: the text has no pattern or no format, or the format or an option is unknown.
    """
    sites, equals, spelled = (part.strip() for part in text.partition("="))
    if not (sites and equals and spelled):
        raise RecipeError(
            f"The rule {text!r} is incomplete; write PATTERN=FORMAT, such as '*.down_proj=uniform:bits=8', or "
            "PATTERN=float."
        )
    weight, at, inputs = (part.strip() for part in spelled.partition("@"))
    chosen = FLOAT if weight == FLOAT else (format_of(weight, default) if weight else None)
    return Rule(sites, chosen, inputs=(parse_inputs(inputs) or FLOAT) if at else None)


def format_of(spelled: str, default: Format) -> Format:
    """Build the format `NAME` or `NAME:key=value,...` in place of `default`, whose bits it takes without its own.

    Raises:
        RecipeError: the format or an option is unknown, or the bits would mean another rate than the default's.
    """
    part = parse_part(FORMATS, spelled)
    kept = {"bits": int(default.rate)} if "bits" in FORMATS.options(part["format"]) else {}
    format: Format = FORMATS.from_dict({**kept, **part})
    if kept.keys() - part.keys() and format.rate != default.rate:  # its bits are not those of a weight
        raise RecipeError(
            f"The recipe has {default.rate:g} bits a weight and {part['format']!r} has {format.rate:g} with "
            f"bits={kept['bits']}; say the bits with the part, as in {part['format']}:bits=N."
        )
    return format
