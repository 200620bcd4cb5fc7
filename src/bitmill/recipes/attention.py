"""How the numbers that attention multiplies are rounded: a format for each of its sites.

attention: {queries: {format: uniform, bits: 8}, keys: {format: uniform, bits: 8}}    a scale a token of a head
attention: {probabilities: {format: uniform, bits: 8, symmetric: false}}              a scale a query of a head

The scales of each call come from its numbers. A simulation: no kernel multiplies them as they are stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from bitmill.architectures.attention import SITES, Rounding, enable_rounded_attention, round_attention
from bitmill.config.parsing import parse_part
from bitmill.errors import RecipeError
from bitmill.formats import FORMATS, Format, GroupFormat
from bitmill.formats.quantized import check_no_table, fit_matrix, nearest_matrix
from bitmill.recipes.inputs import input_format


@dataclass(frozen=True)
class Attention:
    """The formats of what attention multiplies; None for floats.

    Attributes:
        queries, keys, values: of the matrices (tokens, head dimension) of a head.
        probabilities: of those (queries, keys) of a head, after the softmax.
    """

    queries: Format | None = None
    keys: Format | None = None
    values: Format | None = None
    probabilities: Format | None = None

    def __post_init__(self) -> None:
        if not self.formats:
            raise RecipeError(f"attention names no format; give one for {', '.join(SITES[:-1])} or {SITES[-1]}.")
        for site, format in self.formats.items():
            if not isinstance(format, GroupFormat):
                raise RecipeError(
                    f"The {site} of attention cannot be stored as {format!r}; use a format of groups."
                )
            check_no_table(format)

    @property
    def formats(self) -> dict[str, Format]:
        """Site -> its format."""
        named = {each.name: getattr(self, each.name) for each in fields(self)}
        return {site: format for site, format in named.items() if format is not None}

    def roundings(self) -> dict[str, Rounding]:
        """Return site -> function that rounds its numbers."""
        return {site: _rounding(format) for site, format in self.formats.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; `from_dict` is its inverse."""
        return {site: format.to_dict() for site, format in self.formats.items()}

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
        return cls(**{site: input_format(format) for site, format in data.items()})


def attach_attention(model: Any, recipe: Mapping[str, Any] | None) -> None:
    """Let a model round what its attention multiplies, as its recipe says.

    Args:
        model: a model of transformers.
        recipe: as plain data; None for a model without one.

    Raises:
        RecipeError: a site, format or option is unknown, or the model's attention cannot be rounded.
    """
    if stored := (recipe or {}).get("attention"):
        roundings = Attention.from_dict(stored).roundings()
        enable_rounded_attention(model)
        round_attention(model, roundings)


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
        parts[site] = parse_part(FORMATS, format)
    return Attention.from_dict(parts)


def _rounding(format: Format) -> Rounding:
    assert isinstance(format, GroupFormat)

    def rounding(x: Tensor) -> Tensor:
        broken = ~torch.isfinite(x).all(1, keepdim=True)  # has no scale, and stays visible
        x = x.masked_fill(broken, 0.0)
        rounded = nearest_matrix(format, x, fit_matrix(format, x, None, search=False))
        return rounded.dequantize().masked_fill(broken, torch.nan)

    return rounding
