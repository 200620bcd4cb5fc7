"""A recipe: plain data that describes how a model is quantized.

    name: gptq                      the name in reports
    weight: {format: uniform, bits: 3, group_size: 64, symmetric: false}
    solver: {solver: gptq, damp: 0.01, act_order: true, ...}
    transforms: []                  exact changes of the float model, first to last
    rules: []                       exceptions for some layers, first match wins, see `bitmill.recipes.rules`
    inputs: {format: uniform, ...}  how the inputs of layers are rounded, see `bitmill.recipes.inputs`
    attention: {keys: {...}, ...}   how attention rounds what it multiplies, see `bitmill.recipes.attention`
    tuners: []                      learned around the quantized layers, first to last
    ignore: []                      short for leading rules that keep layers in float: glob patterns of their names
    kv: kivi:bits=4                 method of keys and values, as --kv has it, for a folder without another
    head: {format: uniform, ...}    format of embedding and head, rounded to nearest, or float; 8 bits by default

It round-trips through YAML and JSON, is stored with every quantized model, and refuses an illegal combination when
it is built. Named methods (`bitmill.recipes.methods`) are functions from options to a recipe.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bitmill.config.documents import load_yaml
from bitmill.errors import RecipeError, one_line
from bitmill.formats import FORMATS, Format, GroupFormat
from bitmill.recipes.attention import Attention
from bitmill.recipes.inputs import FLOAT, Inputs
from bitmill.recipes.rules import Rule
from bitmill.recipes.scheme import LayerScheme
from bitmill.solvers import SOLVERS, Solver
from bitmill.transforms import TRANSFORMS, Transform
from bitmill.tuners import TUNERS, Tuner


class _RuleDocument(BaseModel):
    """The shape of a rule in a recipe file; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")

    sites: str = Field(min_length=1)
    weight: dict[str, Any] | str | None = None
    solver: dict[str, Any] | None = None
    transforms: list[dict[str, Any]] | None = None
    inputs: dict[str, Any] | str | None = None
    optional: bool = False


class _RecipeDocument(BaseModel):
    """The shape of a recipe file; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1)
    weight: dict[str, Any]
    solver: dict[str, Any]
    transforms: list[dict[str, Any]] = []
    inputs: dict[str, Any] | None = None
    attention: dict[str, Any] | None = None
    tuners: list[dict[str, Any]] = []
    rules: list[_RuleDocument] = []  # or text, as on the command line, see `Recipe.from_dict`
    ignore: list[str] = []
    head: dict[str, Any] | Literal["float"] | None = None
    kv: str | None = Field(None, min_length=1)


@dataclass(frozen=True)
class Recipe:
    """How a model is quantized: a default scheme, rules for some layers, tuners, and the format of the head.

    Attributes:
        name: the name in reports.
        weight, solver, transforms, inputs: the scheme of every layer that no rule matches.
        rules: exceptions, in order; the first one that matches a layer decides.
        tuners: learned around the quantized layers of a block, first to last.
        head: format of embedding and head, or "float"; None for the default, see `choose_head_formats`.
        attention: formats of what attention multiplies, in every block; None for floats.
        kv: method of keys and values with options, as `--kv` has it; None for none.

    Raises:
        RecipeError: parts that cannot work together.
    """

    name: str
    weight: Format
    solver: Solver
    transforms: tuple[Transform, ...] = ()
    rules: tuple[Rule, ...] = ()
    tuners: tuple[Tuner, ...] = ()
    head: Format | Literal["float"] | None = None
    inputs: Inputs | None = None
    attention: Attention | None = None
    kv: str | None = None

    def __post_init__(self) -> None:
        reasons = [scheme.unsupported_reason() for scheme in self.schemes]
        if isinstance(self.head, Format) and not isinstance(self.head, GroupFormat):
            reasons.append(
                f"rows of a table of embeddings are decoded one by one, and {self.head.name!r} decodes whole "
                "matrices; choose another format for the head, such as uniform."
            )
        for scheme in self.schemes:
            reasons += [tuner.unsupported_reason(scheme.format) for tuner in self.tuners]
            reasons += [tuner.unsupported_solver_reason(scheme.solver) for tuner in self.tuners]
        for reason in filter(None, reasons):
            raise RecipeError(f"The recipe {self.name!r} cannot be built: {reason}")

    @cached_property
    def default(self) -> LayerScheme:
        """The scheme of every layer that no rule matches."""
        return LayerScheme(self.weight, self.solver, self.transforms, self.inputs)

    @cached_property
    def schemes(self) -> tuple[LayerScheme, ...]:
        """All distinct schemes: the default, then those of the rules in order."""
        ruled = [scheme for rule in self.rules if (scheme := rule.scheme(self.default))]
        return tuple(dict.fromkeys([self.default, *ruled]))

    def rule_for(self, layer: str) -> Rule | None:
        """Return the first rule that matches a layer's name, or None."""
        return next((rule for rule in self.rules if rule.matches(layer)), None)

    def scheme(self, layer: str) -> LayerScheme | None:
        """Return the scheme of a layer by its full name, or None where it stays in float."""
        rule = self.rule_for(layer)
        return self.default if rule is None else rule.scheme(self.default)

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that calibration must collect; empty for a data-free recipe."""
        needs = [scheme.needs for scheme in self.schemes] + [tuner.needs for tuner in self.tuners]
        return (self.attention.needs if self.attention else frozenset[str]()).union(*needs)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; `from_dict` is its inverse."""
        ignored = tuple(takewhile(lambda rule: rule.is_float, self.rules))
        rules = [rule.to_dict() for rule in self.rules[len(ignored) :]]
        return {
            "name": self.name,
            "weight": self.weight.to_dict(),
            "solver": self.solver.to_dict(),
            "transforms": [t.to_dict() for t in self.transforms],
            **({} if self.inputs is None else {"inputs": self.inputs.to_dict()}),
            **({} if self.attention is None else {"attention": self.attention.to_dict()}),
            "tuners": [t.to_dict() for t in self.tuners],
            "ignore": [rule.sites for rule in ignored],
            **({"rules": rules} if rules else {}),
            **({} if self.kv is None else {"kv": self.kv}),
            **({} if self.head is None else {"head": self.head if self.head == FLOAT else self.head.to_dict()}),
        }

    @classmethod
    def from_dict(cls, data: Any) -> Recipe:
        """Build a recipe from plain data.

        Raises:
            RecipeError: a key or value is wrong; names it.
        """
        try:
            document = _RecipeDocument.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the document"
            raise RecipeError(f"The recipe is not valid at {where}: {first['msg']}.") from None
        ignored = [Rule(pattern, FLOAT) for pattern in document.ignore]
        return cls(
            name=document.name,
            weight=FORMATS.from_dict(document.weight),
            solver=SOLVERS.from_dict(document.solver),
            transforms=tuple(TRANSFORMS.from_dict(t) for t in document.transforms),
            rules=(*ignored, *(Rule.from_dict(rule.model_dump()) for rule in document.rules)),
            tuners=tuple(TUNERS.from_dict(t) for t in document.tuners),
            head=FORMATS.from_dict(document.head) if isinstance(document.head, dict) else document.head,
            inputs=None if document.inputs is None else Inputs.from_dict(document.inputs),
            attention=None if document.attention is None else Attention.from_dict(document.attention),
            kv=document.kv,
        )

    def to_yaml(self) -> str:
        """Return YAML text; `from_yaml` is its inverse."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> Recipe:
        """Build a recipe from YAML or JSON text.

        Raises:
            RecipeError: the text is not valid YAML, or a key or value is wrong.
        """
        try:
            plain = load_yaml(text)
        except ValueError as error:
            raise RecipeError(f"The recipe is not valid YAML: {one_line(error)}.") from None
        return cls.from_dict(plain)

    def to_json(self) -> str:
        """Return JSON text, which `from_yaml` reads too."""
        return json.dumps(self.to_dict())
