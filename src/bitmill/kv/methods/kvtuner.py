"""KVTuner: bits of keys and bits of values for every layer, in the scheme of a method without calibration."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property

from bitmill.config.options import option
from bitmill.errors import RecipeError, quoted
from bitmill.kv.scheme import KV_METHODS, KVMethod, Scheme, kv_method

_PAIR = re.compile(r"(?:(\d{1,4})\*)?([2348])/([2348])", re.ASCII)
_MOST_LAYERS = 4096


@KV_METHODS.register("kvtuner")
@dataclass(frozen=True)
class KVTuner(KVMethod):
    """KVTuner: (bits of keys, bits of values) chosen for every layer.

    Problem    layers differ in how much their attention changes when keys and values are rounded, and keys matter
               more than values; one bit width for all wastes memory in some layers and quality in others
    Equation   layer l is stored as `base` stores it, with b_K(l) bits a key and b_V(l) bits a value
    Search     pairs from 8/8, 8/4, 4/4, 4/2 and 2/2 by the error of each layer's attention output; --budget with
               a context chooses them together with the formats of the weights
    Stored     as `base` stores keys and values
    Departs    bitmill solves one integer programme over weights, keys and values in place of the paper's groups of
               layers and its search by task accuracy
    Needs      nothing
    Expect     fewer bits than one width for all layers at equal quality
    Limits     bases without calibration: kivi, rotated and per_token
    Paper      Li et al. 2025, "KVTuner" (arXiv 2502.04420)
    """

    base: str = option("kivi", "method that stores every layer: kivi, rotated or per_token")
    pairs: str = option(
        "", "bits of keys / bits of values, layer after layer, such as 8/4 28*4/2 2/2; without it all have bits"
    )

    def __post_init__(self) -> None:
        if self.base == self.name or kv_method(self.base).scheme().is_calibrated:
            raise RecipeError(
                f"base is {quoted(self.base)}; use a method of one width without calibration: kivi, rotated or "
                "per_token."
            )

    @cached_property
    def bits_of_layers(self) -> tuple[tuple[int, int], ...]:
        """Bits of keys and of values of each layer; empty where all layers have `bits`.

        Raises:
            RecipeError: pairs are written in another form.
        """
        found: list[tuple[int, int]] = []
        for word in self.pairs.split():
            match = _PAIR.fullmatch(word)
            if match is None or not 1 <= int(match[1] or 1) <= _MOST_LAYERS - len(found):
                raise RecipeError(
                    f"pairs has {quoted(word)}; write bits of keys / bits of values of 2, 3, 4 or 8, such as 8/4, "
                    "or 28*4/2 for 28 layers."
                )
            found += [(int(match[2]), int(match[3]))] * int(match[1] or 1)
        return tuple(found)

    def describe(self) -> str:
        """Return the name, the base, and the pairs or the bits of all layers, in words."""
        return f"{self.name} of {self.base} at {self.pairs or f'{self.bits} bits'}"

    def check_layers(self, count: int) -> None:
        """Raise RecipeError where the pairs are not those of `count` layers."""
        if self.bits_of_layers and len(self.bits_of_layers) != count:
            raise RecipeError(
                f"pairs has {len(self.bits_of_layers)} layers, and the model has {count}; give a pair for each."
            )

    def scheme(self) -> Scheme:
        """Return the scheme of the first layer."""
        return self.layer_scheme(0)

    def layer_scheme(self, number: int) -> Scheme:
        """Return the base's scheme with the bits of a layer."""
        if not self.bits_of_layers:
            return kv_method(self.base, self.bits).scheme()
        if number >= len(self.bits_of_layers):
            raise RecipeError(
                f"pairs has {len(self.bits_of_layers)} layers, and the model has more; give a pair for each."
            )
        keys, values = self.bits_of_layers[number]
        scheme = kv_method(self.base, keys).scheme()
        return replace(scheme, values=replace(scheme.values, bits=values))
