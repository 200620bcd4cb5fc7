"""A recipe: plain data that says what is done to a model, and nothing else.

    name: gptq                      what people call it
    weight: {format: uniform, bits: 3, group_size: 64, symmetric: false}
    solver: {solver: gptq, damp: 0.01, act_order: true, ...}
    transforms: []                  exact changes to the float model, first to last
    tuners: []                      what is learned around the quantized layers, first to last
    ignore: []                      glob patterns of linear layers that stay as they are
    head: {format: uniform, ...}    embedding and head, rounded to nearest; in float where this is left out

It round-trips through YAML and JSON, is stored beside every quantized model, and refuses an illegal
combination when it is built. Named methods (`bitmill.recipes`) are functions from options to a recipe.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bitmill.config.options import check_types
from bitmill.config.options import option as option  # methods take it from here
from bitmill.config.registry import Registry
from bitmill.errors import RecipeError
from bitmill.formats import FORMATS, Format, GroupFormat
from bitmill.solvers import SOLVERS, Solver
from bitmill.transforms import TRANSFORMS, FormatTransform, Transform
from bitmill.tuners import TUNERS, Tuner

METHODS: Registry[type[Method]] = Registry("method", "bitmill.recipes.methods")


class _Document(BaseModel):
    """The shape of a recipe file; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1)
    weight: dict[str, Any]
    solver: dict[str, Any]
    transforms: list[dict[str, Any]] = []
    tuners: list[dict[str, Any]] = []
    ignore: list[str] = []
    head: dict[str, Any] | None = None


@dataclass(frozen=True)
class Recipe:
    """Which format, chosen how, after which transforms, tuned by what."""

    name: str
    weight: Format
    solver: Solver
    transforms: tuple[Transform, ...] = ()
    ignore: tuple[str, ...] = ()
    tuners: tuple[Tuner, ...] = ()
    head: Format | None = None  # of embedding and head

    def __post_init__(self) -> None:
        reasons = [self.solver.unsupported_reason(self.weight.core), self._sharing()]
        if self.head is not None and not isinstance(self.head, GroupFormat):
            reasons.append(
                f"rows of a table of embeddings are decoded one by one, and {self.head.name!r} decodes whole "
                "matrices; choose another format for the head, such as uniform."
            )
        reasons += [
            t.unsupported_reason(self.stored) or t.unsupported_solver_reason(self.solver) for t in self.tuners
        ]
        for reason in filter(None, reasons):
            raise RecipeError(f"The recipe {self.name!r} cannot be built: {reason}")

    def _sharing(self) -> str | None:
        """Why what layers share could not be learned."""
        if not self.stored.shared or self.solver.learner(self.weight.core, 1) is not None:
            return None
        parts = ", ".join(sorted(self.stored.shared))
        return f"{self.solver.name} cannot learn {parts} for many layers at once; use the format without 'shared'."

    @property
    def stored(self) -> Format:
        """The weight format inside what its transforms wrap around it; the first transform is outermost."""
        format = self.weight
        for transform in reversed(self.transforms):
            if isinstance(transform, FormatTransform):
                format = transform.wrap(format)
        return format

    @property
    def needs(self) -> frozenset[str]:
        """What calibration must collect for this recipe; nothing for a data-free one."""
        optional = [t.needs for t in self.transforms] + [t.needs for t in self.tuners]
        return (self.solver.needs | self.stored.needs).union(*optional)

    def ignores(self, layer: str) -> bool:
        """Whether the linear layer called `layer` stays in float."""
        return any(fnmatchcase(layer, pattern) for pattern in self.ignore)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `Recipe.from_dict` is its inverse."""
        return {
            "name": self.name,
            "weight": self.weight.to_dict(),
            "solver": self.solver.to_dict(),
            "transforms": [t.to_dict() for t in self.transforms],
            "tuners": [t.to_dict() for t in self.tuners],
            "ignore": list(self.ignore),
            **({} if self.head is None else {"head": self.head.to_dict()}),
        }

    @classmethod
    def from_dict(cls, data: Any) -> Recipe:
        """Build a recipe from plain data. Raises RecipeError with the offending key or value."""
        try:
            document = _Document.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the document"
            raise RecipeError(f"The recipe is not valid at {where}: {first['msg']}.") from None
        return cls(
            name=document.name,
            weight=FORMATS.from_dict(document.weight),
            solver=SOLVERS.from_dict(document.solver),
            transforms=tuple(TRANSFORMS.from_dict(t) for t in document.transforms),
            tuners=tuple(TUNERS.from_dict(t) for t in document.tuners),
            ignore=tuple(document.ignore),
            head=None if document.head is None else FORMATS.from_dict(document.head),
        )

    def to_yaml(self) -> str:
        """YAML text; `Recipe.from_yaml` is its inverse."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> Recipe:
        """Build a recipe from YAML (of which JSON is a part). Raises RecipeError."""
        try:
            plain = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # dates that are none are a ValueError
            first_line = str(error).splitlines()[0].rstrip(":.")
            raise RecipeError(f"The recipe is not valid YAML: {first_line}.") from None
        return cls.from_dict(plain)

    def to_json(self) -> str:
        """JSON text, a subset of what `from_yaml` reads."""
        return json.dumps(self.to_dict())


@dataclass(frozen=True)
class Method:
    """Base of named methods: options with help, and the recipe they make.

    The class docstring is the method card that `bitmill methods NAME` prints.
    """

    def __post_init__(self) -> None:
        check_types(self, METHODS.name_of(self))

    def recipe(self) -> Recipe:
        """The recipe of these options."""
        raise NotImplementedError


def build_recipe(method: str, options: dict[str, Any] | None = None) -> Recipe:
    """The recipe of a named method with some options set, or of a YAML file.

    Raises RecipeError for an unknown method or option, or a value of the wrong type or range.
    """
    options = options or {}
    if method.endswith((".yaml", ".yml", ".json")):
        if options:
            raise RecipeError(f"{method} is a recipe file, so change {', '.join(options)} in the file itself.")
        return Recipe.from_yaml(_read(Path(method)))
    kind = METHODS.get(method)
    known = kind.__dataclass_fields__
    values = {}
    for key, value in options.items():
        if key not in known:
            raise RecipeError(f"The method {method!r} has no option {key!r}; it has: {', '.join(known)}.")
        values[key] = _typed(method, key, value, known[key].type)
    return kind(**values).recipe()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(
            f"There is no recipe file {path}; give one that is there, or a named method (bitmill methods)."
        ) from None
    except UnicodeDecodeError:
        raise RecipeError(f"The recipe file {path} is not UTF-8 text; give a YAML or JSON file.") from None
    except OSError as error:
        raise RecipeError(f"The recipe file {path} cannot be read: {error.strerror}.") from None


_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _typed(method: str, key: str, value: Any, kind: Any) -> Any:
    """Turn a string from the command line into the type of the option."""
    if not isinstance(value, str):
        return value
    name = str(kind)
    try:
        if name == "bool":
            return _WORDS[value.lower()]
        if name == "int":
            return int(value)
        if name == "float":
            return float(value)
        if name == "GroupSize":
            return parse_group_size(value)
    except (ValueError, KeyError):
        raise RecipeError(f"The option {key} of {method!r} wants {_wants(name)}, not {value!r}.") from None
    return value


def _wants(kind: str) -> str:
    return {"bool": "true or false", "int": "a whole number", "float": "a number"}.get(kind, kind)


def parse_group_size(text: str | int) -> int | Literal["row", "tensor"]:
    """'64', 'row' (also -1), 'tensor' (also 0). Raises RecipeError."""
    word = str(text).strip().lower()
    if word in ("row", "-1"):
        return "row"
    if word in ("tensor", "0"):
        return "tensor"
    if word.isdigit():
        return int(word)
    raise RecipeError(f"group_size is {text!r}; use a positive number of input columns, 'row' or 'tensor'.")
