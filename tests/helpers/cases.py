"""Test cases of every registered member, derived from its dataclass fields."""

from __future__ import annotations

import contextlib
import itertools
import re
import typing
from collections.abc import Hashable
from dataclasses import MISSING, fields, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.formats import FORMATS, Format, GroupFormat, Params, ScalarFormat, Wrapper
from bitmill.formats.quantized import nearest_matrix
from bitmill.numerics.grouping import grouped, grouped_importance
from bitmill.recipes.method import METHODS, build_recipe
from bitmill.solvers import SOLVERS, Solver
from helpers.selection import thin

GROUP_SIZES = (64, 40, "row", "tensor")  # 40 leaves a ragged group of 16 in 96 columns
ROWS, COLUMNS = 6, 96


def with_other_counts(kind: type[GroupFormat]) -> list[GroupFormat]:
    """A format of each kind with one count besides its bits at 1, 2 or 4, where it can have that."""
    first = ragged(kind)[-1]
    counts = [f.name for f in fields(kind) if str(f.type) == "int" and f.name not in ("bits", "group_size")]
    made = []
    for name, value in itertools.product(counts, (1, 2, 4)):
        with contextlib.suppress(RecipeError):
            made.append(replace(first, **{name: value}))
    return made


def switched(kind: type, given: dict[str, Any]) -> list[Any]:
    """`kind(**given)` with every boolean field both ways; combinations that it refuses are left out."""
    switches = [f.name for f in fields(kind) if str(f.type) == "bool" and f.name not in given]
    for f in fields(kind):
        has_value = f.name in given or f.name in switches
        assert has_value or f.default is not MISSING or f.default_factory is not MISSING, (
            f"{kind.__name__}.{f.name} has no default, so tests/helpers/cases.py must give it a value"
        )
    made = []
    for values in itertools.product((False, True), repeat=len(switches)):
        try:
            made.append(kind(**given, **dict(zip(switches, values))))
        except RecipeError:
            continue
    return made


def grouped_formats() -> list[str]:
    return [name for name, kind in FORMATS.items() if issubclass(kind, GroupFormat)]


def formats_of(kind: type[GroupFormat]) -> list[GroupFormat]:
    """Every number of bits on ragged groups, and every kind of group at some of them."""
    made = ragged(kind)
    for bits in sorted({1, middle_bits(made)}):
        for size in (size for size in GROUP_SIZES if size != 40):
            made += built(kind, bits, size)
    assert made, f"no case of {kind.__name__} could be built"
    return made


def ragged(kind: type[GroupFormat]) -> list[GroupFormat]:
    """Every number of bits, on ragged groups."""
    size = 40 if 40 % kind.block == 0 else 5 * kind.block
    return [format for bits in range(1, kind.max_bits + 1) for format in built(kind, bits, size)]


@cache
def built(kind: type[GroupFormat], bits: int, size: int | str) -> tuple[GroupFormat, ...]:
    """The format with every word of its Literal fields and its boolean fields both ways; refused ones left out.

    Scales of another type are those of whole tensors alone.
    """
    hints = typing.get_type_hints(kind)
    words = {name: typing.get_args(h) for name, h in hints.items() if typing.get_origin(h) is Literal}
    if size != "tensor":
        words.pop("scale_type", None)
    made = []
    for chosen in itertools.product(*words.values()):
        with contextlib.suppress(RecipeError):
            made += switched(kind, {"bits": bits, "group_size": size, **dict(zip(words, chosen))})
    return tuple(made)


def middle_bits(formats: list[GroupFormat]) -> int:
    """3 bits, or what the formats have next to it."""
    return min({f.bits for f in formats}, key=lambda bits: (abs(bits - 3), bits))


def all_formats() -> list[GroupFormat]:
    """Every format that solvers use; in a brief run the extreme widths of each, and all of `few_formats`."""
    made = []
    for name in grouped_formats():
        kind = FORMATS.get(name)
        made += thin(formats_of(kind), [ragged(kind)[0], ragged(kind)[-1], *few_of(kind)])
    return list(dict.fromkeys(made))


def all_wrappers() -> list[Format]:
    """Every wrapper at its defaults and with each switch, around a scalar format, or one it can work with."""
    kinds = [kind for _, kind in FORMATS.items() if issubclass(kind, Wrapper)]
    uniform = FORMATS.get("uniform")
    inner = uniform(3, 40)
    made = []
    for kind in kinds:
        given = {"inner": inner, "inputs": uniform(8, "row")}
        given = {f.name: given[f.name] for f in fields(kind) if f.name in given}
        made += [*switched(kind, given), *varied(kind, **given)]
    made.append(FORMATS.get("quantized_inputs")(inner, uniform(8, "tensor"), static=True))
    shares = [FORMATS.get("sum")(inner, outliers=0.05, sensitive=s) for s in (0.0, 0.02)]  # defaults leave few
    shared = FORMATS.get("shared")(FORMATS.get("additive")(3))  # a scalar format has nothing to share
    return [*made, *shares, shared]


def scalar_formats() -> list[ScalarFormat]:
    return [format for format in all_formats() if isinstance(format, ScalarFormat)]


def few_formats() -> list[GroupFormat]:
    """For tests whose cost is in what runs the format: about 3 bits, ragged groups, rows and tensors."""
    return [format for name in grouped_formats() for format in few_of(FORMATS.get(name))]


def few_of(kind: type[GroupFormat]) -> list[GroupFormat]:
    """The formats of one kind in `few_formats`; in a brief run one of rows or of tensors besides ragged ones."""
    formats = formats_of(kind)
    bits = middle_bits(formats)
    made = [f for f in formats if f.bits == bits and f.group_size != 64]
    whole = ("row", "tensor")
    size = whole[len(kind.__name__) % 2]  # a choice that another format does not change
    chosen = next((f for f in made if f.group_size == size), None)
    return thin(made, lambda f: f.group_size not in whole or f is chosen)


def all_solvers() -> list[Solver]:
    """Every switch and choice of each solver; those that build on another one at their defaults."""
    kinds = [kind for _, kind in SOLVERS.items()]
    derived = [kind for kind in kinds if any(base in kinds for base in kind.__mro__[1:])]
    made = [kind() for kind in derived]
    return made + [s for kind in kinds if kind not in derived for s in (*switched(kind, {}), *varied(kind))]


def varied(kind: type, **given: Any) -> list[Any]:
    """The defaults but for one field: each other word of a Literal, and 1 for a count that is 0."""
    made = []
    for f in fields(kind):
        words = re.findall(r"'([^']+)'", str(f.type).replace('"', "'")) if "Literal" in str(f.type) else []
        values = [w for w in words if w != f.default] + ([1] if f.type == "int" and f.default == 0 else [])
        made += [kind(**given, **{f.name: value}) for value in values]
    return made


def method_options(name: str, **options: Any) -> dict[str, Any]:
    """Return those of the options that the method has."""
    return {key: value for key, value in options.items() if key in METHODS.get(name).__dataclass_fields__}


def method_recipe(name: str, **options: Any) -> Any:
    return build_recipe(name, method_options(name, **options))


def weights(rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> Tensor:
    """Heavy-tailed weights of uneven rows, as linear layers have them."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=generator) * 0.05
    W *= 0.5 + torch.rand(rows, 1, generator=generator)
    W[torch.rand(rows, columns, generator=generator) < 0.01] *= 4
    return W + 0.01


def inputs(tokens: int = 400, columns: int = COLUMNS, seed: int = 0, correlation: float = 0.9) -> Tensor:
    """Correlated inputs of uneven channels, X (tokens, columns)."""
    generator = torch.Generator().manual_seed(1000)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    channel_scale = torch.rand(columns, generator=generator).mul(3).exp()
    generator.manual_seed(seed)
    X = torch.randn(tokens, columns, generator=generator)
    few = min(4, columns)
    common = torch.randn(tokens, few, generator=generator) @ mixing[:few] * columns**0.5 / 2
    return ((1 - correlation) * X + correlation * (X @ mixing * 0.3 + common)) * channel_scale


def gram_of(X: Tensor) -> Tensor:
    return X.T @ X / X.shape[0]


def weight_errors(format: GroupFormat, W: Tensor, params: Params, importance: Tensor | None = None) -> Tensor:
    """Weighted squared error of rounding W to nearest under params."""
    decoded = rounded(format, W, params)
    weight = torch.ones(W.shape[1]) if importance is None else importance
    return ((W - decoded).double().square() * weight).sum()


def rounded(format: GroupFormat, W: Tensor, params: Params) -> Tensor:
    """W (rows, columns) rounded to nearest and decoded."""
    return nearest_matrix(format, W, params).dequantize()


def fitted(format: GroupFormat, W: Tensor, importance: Tensor | None = None, search: bool = True) -> Params:
    """Return the parameters of `format` fitted to W; fitted once for equal arguments."""
    given = tuple(
        None if t is None else (tuple(t.shape), t.contiguous().numpy().tobytes()) for t in (W, importance)
    )
    key = (type(format), format, given, search)
    if key not in _FITTED:
        shape = (W.shape[0], W.shape[1])
        weight = grouped_importance(importance, shape, format.group_size, format.block)
        _FITTED[key] = format.fit(grouped(W, format.group_size, format.block), weight, search)
    return {name: part.clone() for name, part in _FITTED[key].items()}


_FITTED: dict[Hashable, Params] = {}


def group_params(params: Params, group: int) -> Params:
    """The parameters of one group, (rows|1, 1, ...); parts that the groups share stay."""
    return {k: v if v.shape[1] == 1 else v[:, group : group + 1] for k, v in params.items()}
