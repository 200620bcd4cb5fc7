"""What a method of the KV cache stores, as plain data.

A *side* is the keys or the values. A token's vector has `channels` = heads * head dim numbers, and each is stored
as a code of `bits` bits that stands for scale * levels[code] + zero, plus a correction where it is an outlier.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from bitmill.config.options import check_types, option
from bitmill.config.registry import Member, Registry
from bitmill.errors import RecipeError

PAGE = 32  # tokens packed at a time: their codes fill whole words at every width
ATTENTION = "bitmill"  # the attention implementation of transformers that reads packed layers

Axis = Literal["static", "channel", "page", "token"]
Levels = Literal["uniform", "normal", "learned"]

_WIDTHS = (2, 3, 4, 8)


@dataclass(frozen=True)
class TensorScheme:
    """How keys or values are stored.

    axis: what has a scale and a zero of its own: each channel, calibrated ("static"), or with calibrated levels
        of its own instead ("channel"); each channel of a page of 32 tokens ("page"); or each token ("token"), in
        groups of `group` channels, of each head, or one for all where it is None.
    levels: "uniform": 0, 1, 2, ...; "normal": the best for a normal distribution (Lloyd and Max), without a zero;
        "learned": calibrated, one table for all channels of the layer.
    outliers: share of a token's numbers that are kept exactly, in fp16 with their channel.
    rotated: heads are turned by a Hadamard matrix first.
    equalized: channels are brought to mean 0 and deviation 1 first, as calibrated; undone on the sum of values.
    q_norm: learned levels are shifted and stretched to give back mean and deviation.
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
        check_types(self, "a KV side")
        if self.bits not in _WIDTHS or (self.levels != "uniform" and self.bits > 4):
            widths = "2, 3, 4 or 8" if self.levels == "uniform" else "2, 3 or 4"
            raise RecipeError(
                f"bits of keys and values are {self.bits!r}; use {widths} with {self.levels} levels."
            )
        if not 0 <= self.outliers < 0.5:
            raise RecipeError(f"The share of outliers is {self.outliers}; use a number from 0 to 0.5.")
        if self.group is not None and self.axis != "token":
            raise RecipeError(f"Scales are per {self.axis}, and group is {self.group}; use axis 'token' with it.")
        if isinstance(self.group, int) and self.group < 1:
            raise RecipeError(f"group is {self.group}; use a positive number of channels, or 'head'.")
        if self.axis == "channel" and self.levels != "learned":
            raise RecipeError(f"Levels of each channel are learned, not {self.levels}; use learned ones.")
        if self.equalized and self.rotated:
            raise RecipeError("Channels are either equalized or turned by a Hadamard matrix; choose one.")
        if self.q_norm and self.levels != "learned":
            raise RecipeError("q_norm moves learned levels; leave it out with others.")

    @property
    def has_zero(self) -> bool:
        """Whether a zero is stored beside the scale."""
        return self.levels != "normal"

    @property
    def is_calibrated(self) -> bool:
        """Whether it needs numbers that are found beforehand."""
        return self.is_fixed or self.equalized or self.levels == "learned"

    @property
    def is_fixed(self) -> bool:
        """Whether channels are calibrated once and for all, so that pages hold no scales."""
        return self.axis in ("static", "channel")

    def groups(self, heads: int, dim: int) -> int:
        """Groups of channels of a token that have a scale of their own. Raises RecipeError."""
        if self.group is None:
            return 1
        if self.group == "head":
            return heads
        if dim % self.group:
            raise RecipeError(
                f"{self.group} channels share a scale, and heads have {dim}; use a divisor of {dim}, or none."
            )
        return heads * dim // self.group

    def outlier_count(self, channels: int) -> int:
        """Numbers of a token that are kept exactly: the share of its channels, rounded, and at least one."""
        return max(1, round(self.outliers * channels)) if self.outliers else 0


@dataclass(frozen=True)
class Scheme:
    """Keys, values, and what is left in float.

    pre_rope: keys are stored as they are before the rotary embedding, which is applied when they are read.
    sink: first tokens of a sequence kept in fp16.  residual: tokens that wait in fp16 beyond a started page, whole
        pages of them, so that all tokens of a page see the same pages packed: a text that is read page by page is
        then answered as one that is generated token by token.
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
            raise RecipeError("Keys are either turned by a Hadamard matrix or stored before RoPE; choose one.")
        if self.keys.equalized:
            raise RecipeError("Channels of values can be equalized, not those of keys: leave it out.")
        if self.sink < 0 or self.residual < 0:
            raise RecipeError(f"sink is {self.sink} and residual {self.residual}; use 0 or positive numbers.")
        check_residual(self.residual)

    @property
    def is_calibrated(self) -> bool:
        """Whether it needs numbers that are found beforehand."""
        return self.keys.is_calibrated or self.values.is_calibrated

    @property
    def tail(self) -> int:
        """Tokens for which there must be room in fp16."""
        return self.residual + PAGE


def check_residual(residual: int) -> None:
    """Raises RecipeError for tokens in float that are no whole pages."""
    if residual % PAGE:
        raise RecipeError(f"residual is {residual}; use a multiple of {PAGE}.")


KV_METHODS: Registry[type[KVMethod]] = Registry("kv method", "bitmill.kv.methods")


@dataclass(frozen=True)
class KVMethod(Member):
    """A published way to store keys and values: options, and the scheme they make.

    The docstring of a member is its card.
    """

    registry: ClassVar[Registry[Any]] = KV_METHODS

    bits: int = option(4, "bits of a code: 2, 3, 4, or 8 where levels are uniform")

    @property
    def weighs_errors(self) -> bool:
        """Whether calibration weighs errors by the squared gradient of the loss: the option `fisher`."""
        return bool(getattr(self, "fisher", False))

    def scheme(self) -> Scheme:
        """What is stored. Raises RecipeError for options that do not go together."""
        raise NotImplementedError


def kv_method(name: str, bits: int | None = None, **options: Any) -> KVMethod:
    """The method of that name with these options. Raises RecipeError, naming those there are."""
    values = {**({} if bits is None else {"bits": bits}), **options}
    known = KV_METHODS.options(name)
    for key in values:
        if key not in known:
            raise KV_METHODS.no_option(name, key)
    method: KVMethod = KV_METHODS.get(name)(**values)
    method.scheme()
    return method
