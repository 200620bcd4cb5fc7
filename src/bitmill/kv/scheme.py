"""Storage schemes of keys and values, and the registry of KV methods.

A token's key (or value) vector has channels = heads * head_dim numbers. Each is stored as a code of `bits` bits
that decodes to scale * levels[code] + zero, plus a correction where the number is an outlier.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from bitmill.config.options import check_types, option
from bitmill.config.registry import Member, Registry
from bitmill.errors import RecipeError

PAGE = 32  # tokens packed at a time: their codes fill whole words at every bit width
ATTENTION = "bitmill"  # name of the transformers attention implementation that reads packed layers

Axis = Literal["static", "channel", "page", "token"]
Levels = Literal["uniform", "normal", "learned"]

_BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class TensorScheme:
    """Storage scheme of either the keys or the values.

    Attributes:
        bits: bits of a code.
        axis: granularity of scale and zero. "static": one pair per channel, calibrated. "channel": calibrated
            levels per channel instead of a scale. "page": one pair per channel of a page of 32 tokens. "token":
            one pair per token and group of channels.
        group: with axis "token": channels per group, "head" for one group per head, None for a single group.
        levels: "uniform": 0, 1, 2, ...; "normal": optimal for a normal distribution (Lloyd-Max), without a zero;
            "learned": calibrated, one table for all channels of the layer.
        outliers: fraction of a token's numbers stored exactly, in fp16 with their channel index.
        rotated: heads are multiplied by a Hadamard matrix before quantization.
        q_norm: learned levels are shifted and scaled to preserve mean and deviation.
        equalized: channels are normalized to mean 0 and deviation 1 (calibrated) before quantization; undone on
            the weighted sum of values.
    """

    bits: int
    axis: Axis
    group: int | Literal["head"] | None = None
    levels: Levels = "uniform"
    outliers: float = 0.0
    rotated: bool = False
    q_norm: bool = False
    equalized: bool = False

    def __post_init__(self) -> None:
        check_types(self, "a KV tensor scheme")
        if self.bits not in _BITS or (self.levels != "uniform" and self.bits > 4):
            allowed = "2, 3, 4 or 8" if self.levels == "uniform" else "2, 3 or 4"
            raise RecipeError(
                f"bits of keys and values are {self.bits!r}; use {allowed} with {self.levels} levels."
            )
        if not 0 <= self.outliers < 0.5:
            raise RecipeError(f"The fraction of outliers is {self.outliers}; use a number from 0 to 0.5.")
        if self.group is not None and self.axis != "token":
            raise RecipeError(f"Scales are per {self.axis}, and group is {self.group}; use axis 'token' with it.")
        if isinstance(self.group, int) and self.group < 1:
            raise RecipeError(f"group is {self.group}; use a positive number of channels, or 'head'.")
        if self.axis == "channel" and self.levels != "learned":
            raise RecipeError(f"Levels per channel must be learned, not {self.levels}; use learned ones.")
        if self.equalized and self.rotated:
            raise RecipeError("Channels are either equalized or rotated by a Hadamard matrix; choose one.")
        if self.q_norm and self.levels != "learned":
            raise RecipeError("q_norm adjusts learned levels; leave it out with other levels.")

    @property
    def has_zero(self) -> bool:
        """Return True if a zero point is stored with each scale."""
        return self.levels != "normal"

    @property
    def is_calibrated(self) -> bool:
        """Return True if parameters must be calibrated before the first token is stored."""
        return self.is_static or self.equalized or self.levels == "learned"

    @property
    def is_static(self) -> bool:
        """Return True if channels are calibrated once, so that pages hold no scales."""
        return self.axis in ("static", "channel")

    def num_groups(self, heads: int, dim: int) -> int:
        """Return the number of channel groups of a token with a scale each.

        Args:
            heads: key/value heads.
            dim: head dimension.

        Raises:
            RecipeError: `group` does not divide the head dimension.
        """
        if self.group is None:
            return 1
        if self.group == "head":
            return heads
        if dim % self.group:
            raise RecipeError(
                f"{self.group} channels share a scale, and heads have {dim}; use a divisor of {dim}, or none."
            )
        return heads * dim // self.group

    def num_outliers(self, channels: int) -> int:
        """Return the outliers per token: the rounded fraction of its channels, at least one unless it is zero."""
        return max(1, round(self.outliers * channels)) if self.outliers else 0


@dataclass(frozen=True)
class Scheme:
    """Storage scheme of a KV cache: keys, values, and the tokens kept in fp16.

    Attributes:
        keys: scheme of the keys.
        values: scheme of the values.
        pre_rope: keys are stored before the rotary embedding, which is applied when they are read.
        sink: first tokens of a sequence (attention sinks) kept in fp16.
        residual: recent tokens kept in fp16 in addition to the page being filled, in whole pages, so that all
            tokens of a page see the same pages packed: a text that is read page by page gives the same logits as
            one that is generated token by token.
    """

    keys: TensorScheme
    values: TensorScheme
    pre_rope: bool = False
    sink: int = 0
    residual: int = 0

    def __post_init__(self) -> None:
        check_types(self, "a KV scheme")
        if self.values.axis != "token":
            raise RecipeError(f"Values have scales per {self.values.axis}; use 'token'.")
        if self.pre_rope and self.keys.rotated:
            raise RecipeError("Keys are either rotated by a Hadamard matrix or stored before RoPE; choose one.")
        if self.keys.equalized:
            raise RecipeError("Channels of values can be equalized, not those of keys: leave it out.")
        if self.sink < 0 or self.residual < 0:
            raise RecipeError(f"sink is {self.sink} and residual {self.residual}; use 0 or positive numbers.")
        check_residual(self.residual)

    @property
    def is_calibrated(self) -> bool:
        """Return True if keys or values need calibrated parameters."""
        return self.keys.is_calibrated or self.values.is_calibrated

    @property
    def buffer_size(self) -> int:
        """Return the recent tokens the fp16 buffer has room for: the residual and one page."""
        return self.residual + PAGE


def check_residual(residual: int) -> None:
    """Raise RecipeError unless the residual is a whole number of pages."""
    if residual % PAGE:
        raise RecipeError(f"residual is {residual}; use a multiple of {PAGE}.")


KV_METHODS: Registry[type[KVMethod]] = Registry("kv method", "bitmill.kv.methods")


@dataclass(frozen=True)
class KVMethod(Member):
    """Base of published methods of KV cache quantization: options, and the scheme they make.

    The docstring of a member is its card.
    """

    registry: ClassVar[Registry[Any]] = KV_METHODS

    bits: int = option(4, "bits of a code: 2, 3, 4, or 8 where levels are uniform")

    @property
    def uses_gradients(self) -> bool:
        """Return True if calibration weights errors by the squared gradient of the loss (option `fisher`)."""
        return bool(getattr(self, "fisher", False))

    def describe(self) -> str:
        """Return the name, the bits, and the options that differ from their defaults, in words."""
        default = type(self)()
        changed = [f.name for f in fields(self) if getattr(self, f.name) != getattr(default, f.name)]
        more = "".join(f", {name} {getattr(self, name)}" for name in changed if name != "bits")
        return f"{self.name} at {self.bits} bits{more}"

    def scheme(self) -> Scheme:
        """Return the storage scheme. Raise RecipeError when options contradict each other."""
        raise NotImplementedError

    def check_layers(self, count: int) -> None:
        """Raise RecipeError where the options are those of another number of layers than `count`."""

    def layer_scheme(self, number: int) -> Scheme:
        """Return the storage scheme of one layer of the cache: that of all layers, unless a method mixes them.

        Args:
            number: index of the layer.

        Raises:
            RecipeError: the options name fewer layers.
        """
        return self.scheme()


def kv_method(name: str, bits: int | None = None, **options: Any) -> KVMethod:
    """Return a KV method with the given options.

    Args:
        name: registered name, such as "kivi".
        bits: bits of a code; None for the method's default.
        options: further options of the method.

    Raises:
        RecipeError: the name or an option is unknown (the message lists the known ones), or options contradict
            each other.
    """
    values = {**({} if bits is None else {"bits": bits}), **options}
    known = KV_METHODS.options(name)
    for key in values:
        if key not in known:
            raise KV_METHODS.unknown_option(name, key)
    method: KVMethod = KV_METHODS.get(name)(**values)
    method.scheme()
    return method
