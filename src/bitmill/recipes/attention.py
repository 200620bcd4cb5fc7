"""How the numbers that attention multiplies are rounded: a format for each of its sites.

attention: {queries: {format: uniform, bits: 8}, keys: {format: uniform, bits: 8}}    a scale a token of a head
attention: {probabilities: {format: uniform, bits: 8, symmetric: false}}              a scale a query of a head

The scales of each call come from its numbers; those of probabilities with `static` from calibration, once a block:

attention: {probabilities: {format: adalog, bits: 4, group_size: tensor, static: true}}

A quantized folder has them as `parameters`, a list with those of every block. All of it is a simulation: no kernel
multiplies these numbers as they are stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bitmill.architectures.attention import (
    SITES,
    Rounding,
    enable_rounded_attention,
    round_attention,
    round_attention_blocks,
)
from bitmill.config.parsing import parse_part
from bitmill.errors import RecipeError
from bitmill.formats import FORMATS, Format, GroupFormat, Params, ScalarFormat
from bitmill.formats.quantized import check_no_table, fit_matrix, nearest_matrix
from bitmill.formats.static_search import StaticFormat
from bitmill.recipes.inputs import input_format

STATIC, PARAMETERS = "static", "parameters"  # keys of probabilities beside those of the format


@dataclass(frozen=True)
class Attention:
    """The formats of what attention multiplies; None for floats.

    Attributes:
        queries, keys, values: of the matrices (tokens, head dimension) of a head.
        probabilities: of those (queries, keys) of a head, after the softmax.
        static: the parameters of probabilities come from calibration, one set a block.
        parameters: of probabilities, (name, value) pairs of every block; empty before calibration.
    """

    queries: Format | None = None
    keys: Format | None = None
    values: Format | None = None
    probabilities: Format | None = None
    static: bool = False
    parameters: tuple[tuple[tuple[str, float], ...], ...] = ()

    def __post_init__(self) -> None:
        if not self.formats:
            raise RecipeError(f"attention names no format; give one for {', '.join(SITES[:-1])} or {SITES[-1]}.")
        for site, format in self.formats.items():
            if not isinstance(format, GroupFormat):
                raise RecipeError(
                    f"The {site} of attention cannot be stored as {format!r}; use a format of groups."
                )
            check_no_table(format)
        searched = isinstance(self.probabilities, StaticFormat) and isinstance(self.probabilities, ScalarFormat)
        if self.static and not (searched and self.static_format.group_size == "tensor"):
            raise RecipeError(
                f"The probabilities of attention are {self.probabilities!r}, which have no parameters from "
                "calibration; use group_size=tensor with uniform, adalog, log2 or log_sqrt2, or leave static out."
            )

    @property
    def static_format(self) -> ScalarFormat:
        """The format of probabilities with static parameters."""
        assert isinstance(self.probabilities, ScalarFormat)
        return self.probabilities

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that calibration must collect: any, so that there is calibration data."""
        return frozenset({"activations"}) if self.static else frozenset()

    @property
    def formats(self) -> dict[str, Format]:
        """Site -> its format."""
        named = {site: getattr(self, site) for site in SITES}
        return {site: format for site, format in named.items() if format is not None}

    def roundings(self, block: int = 0) -> dict[str, Rounding]:
        """Return site -> function that rounds its numbers.

        Args:
            block: index of the block, whose static parameters are used.

        Raises:
            RecipeError: static parameters of the block are missing.
        """
        found = {site: _rounding(format) for site, format in self.formats.items()}
        if self.static:
            if block >= len(self.parameters):
                raise RecipeError(
                    f"The probabilities of attention have static parameters of {len(self.parameters)} blocks, and "
                    f"block {block} has none; quantize the model again."
                )
            params = {name: torch.tensor([[value]]) for name, value in self.parameters[block]}
            found["probabilities"] = _rounding(self.static_format, params)
        return found

    def calibrated(self, params: Sequence[Params]) -> Attention:
        """Return the formats with static parameters.

        Args:
            params: of the probabilities of every block, (1, 1) each.
        """
        plain = tuple(tuple((name, float(value)) for name, value in sorted(one.items())) for one in params)
        return replace(self, parameters=plain)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; `from_dict` is its inverse."""
        data = {site: format.to_dict() for site, format in self.formats.items()}
        if self.static:
            data["probabilities"][STATIC] = True
        if self.parameters:
            data["probabilities"][PARAMETERS] = [dict(one) for one in self.parameters]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Attention:
        """Build from site -> data of a format.

        Raises:
            RecipeError: an unknown site, format or option, or a value of another type.
        """
        for site, format in data.items():
            if site not in SITES:
                raise RecipeError(f"attention has no {site!r}; it has {', '.join(SITES)}.")
            if not isinstance(format, dict):
                raise RecipeError(
                    f"The {site} of attention are {format!r}; use a format such as {{format: uniform, bits: 8}}."
                )
        static = bool(data.get("probabilities", {}).get(STATIC, False))
        parameters = _parameters(data.get("probabilities", {}).get(PARAMETERS, []))
        own = {site: {k: v for k, v in of.items() if k not in (STATIC, PARAMETERS)} for site, of in data.items()}
        if any(len(own[site]) < len(data[site]) for site in data if site != "probabilities"):
            raise RecipeError("Only probabilities of attention have static parameters; leave static out.")
        return cls(
            **{site: input_format(format) for site, format in own.items()}, static=static, parameters=parameters
        )


def attach_attention(model: Any, recipe: Mapping[str, Any] | None) -> None:
    """Let a model round what its attention multiplies, as its recipe says.

    Args:
        model: a model of transformers.
        recipe: as plain data; None for a model without one.

    Raises:
        RecipeError: a site, format or option is unknown, or the model's attention cannot be rounded.
    """
    if stored := (recipe or {}).get("attention"):
        attention = Attention.from_dict(stored)
        enable_rounded_attention(model)
        if attention.static:
            blocks = range(len(attention.parameters))
            round_attention_blocks(model, [attention.roundings(block) for block in blocks])
        else:
            round_attention(model, attention.roundings())


def parse_attention(spelled: Sequence[str]) -> Attention:
    """Parse SITE=FORMAT:key=value,... as on the command line.

    Raises:
        RecipeError: an unknown site, format or option, a text without both, or a site with two formats.
    """
    parts: dict[str, Any] = {}
    for text in spelled:
        site, equals, format = (part.strip() for part in text.partition("="))
        if not (site and equals and format):
            raise RecipeError(
                f"attention is {text!r}; write SITE=FORMAT, such as keys=uniform:bits=8, with a site of "
                f"{', '.join(SITES)}."
            )
        if site in parts:
            raise RecipeError(f"attention names two formats for {site}; leave out one.")
        parts[site] = parse_part(FORMATS, format, extra={STATIC: False} if site == "probabilities" else {})
    return Attention.from_dict(parts)


def _parameters(stored: Any) -> tuple[tuple[tuple[str, float], ...], ...]:
    """Return stored static parameters. Raises RecipeError where they are no numbers by name."""
    blocks: list[Any] = stored if isinstance(stored, list) else [None]
    for one in blocks:
        if not isinstance(one, dict) or not all(
            isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            for value in one.values()
        ):
            raise RecipeError(f"The parameters of probabilities are {one!r} in a block; quantize the model again.")
    return tuple(tuple((name, float(value)) for name, value in sorted(one.items())) for one in blocks)


def _rounding(format: Format, params: Params | None = None) -> Rounding:
    """Return a function that rounds numbers (rows, columns), with static parameters or those of each call."""
    assert isinstance(format, GroupFormat)

    def rounding(x: Tensor) -> Tensor:
        broken = ~torch.isfinite(x).all(1, keepdim=True)  # has no scale, and stays visible
        x = x.masked_fill(broken, 0.0)
        fitted = fit_matrix(format, x, None, search=False) if params is None else params
        rounded = nearest_matrix(format, x, fitted)
        return rounded.dequantize().masked_fill(broken, torch.nan)

    return rounding
