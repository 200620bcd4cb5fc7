"""How the numbers that attention multiplies are rounded: a format for each of its sites.

attention: {queries: {format: uniform, bits: 8}, keys: {format: uniform, bits: 8}}    a scale a token of a head
attention: {probabilities: {format: uniform, bits: 8, symmetric: false}}              a scale a query of a head

The scales of each call come from its numbers; those of a site with `static` from calibration, once a block:

attention: {keys: {format: uniform, bits: 8, group_size: tensor, static: true}}
attention: {probabilities: {format: adalog, bits: 4, group_size: tensor, static: true}}

In encoders a scale of values can be that of a channel, over all tokens of a head:

attention: {values: {format: uniform, bits: 8, channels: true}}

A quantized folder has them as `parameters`, a list with those of every block. Numbers beyond the static range
become its outermost levels. Integers multiply where both sites have them and the numbers of a sum share a scale:
one a token, or one for all, of queries, keys and probabilities, and one a channel, or one for all, of values.
Elsewhere it is a simulation: numbers are rounded, and multiplied in floats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from bitmill.architectures.adapter import adapter_for
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
from bitmill.formats.quantized import check_no_table
from bitmill.recipes.inputs import input_format
from bitmill.runtime.attention.integers import FormatRounding

STATIC, PARAMETERS, CHANNELS = "static", "parameters", "channels"  # keys of a site beside those of its format
BlockParams = tuple[tuple[str, float], ...]  # static parameters of a block by name


@dataclass(frozen=True)
class Attention:
    """The formats of what attention multiplies; None for floats.

    Attributes:
        queries, keys, values: of the matrices (tokens, head dimension) of a head.
        probabilities: of those (queries, keys) of a head, after the softmax.
        static: sites whose parameters come from calibration, one set a block.
        channels: sites whose scales are those of channels, over the tokens of a head: values, or none.
        parameters: site with `static` -> its parameters in every block; empty before calibration.
    """

    queries: Format | None = None
    keys: Format | None = None
    values: Format | None = None
    probabilities: Format | None = None
    static: frozenset[str] = frozenset()
    channels: frozenset[str] = frozenset()
    parameters: Mapping[str, tuple[BlockParams, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.formats:
            raise RecipeError(f"attention names no format; give one for {', '.join(SITES[:-1])} or {SITES[-1]}.")
        for site, format in self.formats.items():
            if not isinstance(format, GroupFormat):
                raise RecipeError(
                    f"The {site} of attention cannot be stored as {format!r}; use a format of groups."
                )
            check_no_table(format)
            if site in self.channels and (site != "values" or site in self.static):
                raise RecipeError(
                    f"The {site} of attention have channels=true, which values alone can have, without static; "
                    "leave it out."
                )
            if site in self.static and not (isinstance(format, ScalarFormat) and format.group_size == "tensor"):
                raise RecipeError(
                    f"The {site} of attention are {format!r}, which has no scale from calibration; use "
                    "group_size=tensor with a format of single numbers, such as uniform, or leave static out."
                )

    def static_format(self, site: str) -> ScalarFormat:
        """Return the format of a site with static parameters."""
        format = self.formats[site]
        assert isinstance(format, ScalarFormat)
        return format

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
        return {
            site: FormatRounding(format, self._params(site, block), site in self.channels)
            for site, format in self.formats.items()
        }

    def _params(self, site: str, block: int) -> Params | None:
        """Return the static parameters of a site in a block, (1, 1) each; None where each call has its own."""
        if site not in self.static:
            return None
        blocks = self.parameters.get(site, ())
        if block >= len(blocks):
            raise RecipeError(
                f"The {site} of attention have static parameters of {len(blocks)} blocks, and block {block} has "
                "none; quantize the model again."
            )
        return {name: torch.tensor([[value]]) for name, value in blocks[block]}

    @property
    def calibrated_blocks(self) -> int:
        """The number of blocks that have static parameters."""
        return min((len(self.parameters.get(site, ())) for site in self.static), default=0)

    def calibrated(self, params: Mapping[str, Sequence[Params]]) -> Attention:
        """Return the formats with static parameters.

        Args:
            params: site with `static` -> its parameters in every block, (1, 1) each.
        """
        plain = {
            site: tuple(tuple((name, float(value)) for name, value in sorted(one.items())) for one in blocks)
            for site, blocks in params.items()
        }
        return replace(self, parameters=plain)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; `from_dict` is its inverse."""
        data = {site: format.to_dict() for site, format in self.formats.items()}
        for key, sites in ((STATIC, self.static), (CHANNELS, self.channels)):
            for site in sites:
                data[site][key] = True
        for site, blocks in self.parameters.items():
            data[site][PARAMETERS] = [dict(one) for one in blocks]
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
        keys = (STATIC, PARAMETERS, CHANNELS)
        own = {site: {k: v for k, v in of.items() if k not in keys} for site, of in data.items()}
        static, channels = (_sites_with(key, data) for key in (STATIC, CHANNELS))
        parameters = {
            site: _parameters(site, data[site][PARAMETERS]) for site in static if PARAMETERS in data[site]
        }
        formats = {site: input_format(format) for site, format in own.items()}
        return cls(**formats, static=static, channels=channels, parameters=parameters)


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
            blocks = range(attention.calibrated_blocks)
            adapter = adapter_for(model.config)
            modules = list(model.get_submodule(adapter.blocks)) if adapter else [model]
            round_attention_blocks(modules, [attention.roundings(block) for block in blocks])
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
        parts[site] = parse_part(FORMATS, format, extra={STATIC: False, CHANNELS: False})
    return Attention.from_dict(parts)


def _sites_with(key: str, data: dict[str, Any]) -> frozenset[str]:
    """Return the sites whose data have `key` as true. Raises RecipeError where it is neither true nor false."""
    for site, format in data.items():
        if not isinstance(chosen := format.get(key, False), bool):
            raise RecipeError(f"{key} of the {site} of attention is {chosen!r}; use true or false.")
    return frozenset(site for site, format in data.items() if format.get(key))


def _parameters(site: str, stored: Any) -> tuple[BlockParams, ...]:
    """Return stored static parameters. Raises RecipeError where they are no numbers by name."""
    blocks: list[Any] = stored if isinstance(stored, list) else [None]
    for one in blocks:
        if not isinstance(one, dict) or not all(
            isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            for value in one.values()
        ):
            raise RecipeError(f"The parameters of {site} are {one!r} in a block; quantize the model again.")
    return tuple(tuple((name, float(value)) for name, value in sorted(one.items())) for one in blocks)
