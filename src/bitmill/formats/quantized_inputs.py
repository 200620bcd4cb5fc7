"""Quantized inputs: another format for the matrix, and one for the numbers that it multiplies.

    y = Q(x) W^^T      W^ the matrix in the inner format, Q(x) the inputs (tokens, columns) in the format `inputs`

Inputs are coded as a matrix of one row a token: group_size "row" is a scale a token, a number of columns a
scale for that many columns of a token. The scales of each call come from its inputs (dynamic), from the largest
or, with `search`, those of least error of the inputs; except with `static`: one scale for all inputs, "tensor",
from the largest input that calibration met or, with `search`, that of least error of the outputs on inputs of
the calibration.

With `adaptive` too, each token has a scale of its own that follows from the mean magnitude of its inputs: the
static one times gain * mean |x| / static scale + offset, neither of which is negative, so that the factor
cannot vanish (ASQ).

    input_NAME   with static alone: the parts of `inputs` for one group
    input_gain, input_offset   with adaptive alone, fp16 each

A matrix in another basis, or without some columns, gives the inner formats those inputs: they are rounded where
they are multiplied. `simulated` allows pairs of formats that no kernel multiplies as stored: inputs are then
rounded and multiplied in floats.

With a `threshold`, columns in which any input of the call reaches it are multiplied in float and do not count
for the scales (LLM.int8).

A token with NaN or Inf has NaN as outputs. Bits a weight: the inner format's; with static 16 or more a matrix.

Sources: Dettmers et al. 2022 (arXiv 2208.07339), section 2; Xiao et al. 2022 (arXiv 2211.10438), section 3; for
adaptive scales "ASQ + POST" 2025 (arXiv 2504.17263), where a net of two layers computes the factor of a picture
from its channels' means, and is trained with the network.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.formats.adaptive import fit_factor, of_tokens
from bitmill.formats.base import FORMATS, Format, GroupFormat, Params
from bitmill.formats.part import Part
from bitmill.formats.quantized import Quantized, check_no_table, fit_matrix, nearest_matrix
from bitmill.formats.scalar import RangeFormat, ScalarFormat
from bitmill.formats.static_search import StaticFormat, search_static
from bitmill.formats.wrapper import Reduction, Wrapper
from bitmill.numerics.statistics import Statistics

_PREFIX = "input_"


@FORMATS.register("quantized_inputs")
@dataclass(frozen=True)
class QuantizedInputs(Wrapper):
    """The inner format for a matrix whose inputs are rounded to the format `inputs`."""

    inputs: Format
    static: bool = False
    simulated: bool = False
    threshold: float = 0.0
    search: bool = False
    adaptive: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.inputs, GroupFormat):
            raise RecipeError(f"Inputs cannot be stored as {self.inputs.name!r}; use a format of groups.")
        self._check_parameters(self.inputs)
        if self.search and not isinstance(self.inputs, StaticFormat if self.static else ScalarFormat):
            raise RecipeError(
                f"search looks for scales of inputs in formats of single numbers (with static in uniform, adalog, "
                f"log2 and log_sqrt2), and the inputs are {self.inputs!r} with static={self.static}; leave it out."
            )
        if self.adaptive and not (self.static and isinstance(self.inputs, RangeFormat)):
            raise RecipeError(
                f"adaptive changes the static scale of evenly spaced levels, and the inputs are {self.inputs!r} "
                f"with static={self.static}; set static=true with uniform inputs, or leave adaptive out."
            )
        if self.inner.quantizes_inputs:
            raise RecipeError("The inputs of a layer are quantized twice; name one format for them.")
        if not self.threshold >= 0:
            raise RecipeError(f"threshold of the inputs is {self.threshold!r}; use a magnitude, or 0 for none.")
        if self.static and self.inputs.group_size != "tensor":
            raise RecipeError(
                f"The inputs have group_size {self.inputs.group_size!r}, and a static scale is that of all tokens "
                "and columns; use group_size=tensor, or leave static out."
            )

    def _check_parameters(self, inputs: GroupFormat) -> None:
        """Raise RecipeError for tables that the tokens of a call share, and for static scales of other sizes."""
        if not self.static:
            check_no_table(inputs)
        if self.static and not isinstance(inputs, ScalarFormat):
            raise RecipeError(
                f"A static scale comes from the largest inputs, and that of {inputs.name!r} from the mean square; "
                "leave static out."
            )

    @property
    def input_format(self) -> GroupFormat:
        """The format of the inputs."""
        assert isinstance(self.inputs, GroupFormat)
        return self.inputs

    @property
    def multiplies_integers(self) -> bool:
        """True where integers of inputs and matrix multiply: evenly spaced levels, or inputs of several bytes."""
        return self._arithmetics == {"integer"}

    @property
    def multiplies_as_stored(self) -> bool:
        """True for integers, and for floats of 8 bits, whose products are exact in fp32."""
        return len(self._arithmetics) == 1 and None not in self._arithmetics

    def steps_fit(self, columns: int) -> bool:
        """Return True if inputs of one scale are whole groups of a matrix of so many columns, or parts of one.

        Sums of integers end where a scale does, at multiples of 16 columns. Elsewhere rounded inputs multiply in
        floats.
        """
        inner = self.inner.core
        assert isinstance(inner, GroupFormat)
        step, group = min(self.input_format.width((1, columns)), columns), inner.width((1, columns))
        parts = step % 16 == 0 and (group >= columns or group % step == 0)
        return step >= columns or step % group == 0 or parts

    def uncompiled_reason(self, columns: int) -> str | None:
        """Return why no compiled kernel rounds and multiplies a few tokens of inputs."""
        if not self.multiplies_integers:
            names = self.input_format.name, self.inner.core.name
            return f"inputs in {names[0]} and weights in {names[1]} have no integers that multiply"
        if not isinstance(self.inputs, RangeFormat):
            return f"the levels of inputs in {self.input_format.name} are not evenly spaced"
        if self.search and not self.static:
            return "scales of tokens are searched"
        if self.adaptive:
            return "scales of tokens are computed from their inputs' mean magnitude"
        if not self.steps_fit(columns):
            return "columns that share a scale of the inputs are no groups of the weights"
        if self.input_format.group_size == "tensor" and not self.static:
            return "all tokens of a call share a scale of the inputs"
        return None

    @property
    def _arithmetics(self) -> set[str | None]:
        of_matrix = self.inner.arithmetic if isinstance(self.inner, GroupFormat) else None
        return {self.input_format.input_arithmetic, of_matrix}

    @property
    def needs(self) -> frozenset[str]:
        """The largest inputs with static, and with search too some of the inputs."""
        own = {"activations": self.static, "samples": (self.search and self.static) or self.adaptive}
        return self.inner.needs | frozenset(name for name, needed in own.items() if needed)

    @property
    def stackable(self) -> bool:
        """True where the inner format is: layers that read one input have equal scales of it."""
        return self.inner.stackable

    @property
    def quantizes_inputs(self) -> bool:
        """True."""
        return True

    @property
    def fits_inputs(self) -> bool:
        """True unless scales come from calibration."""
        return not self.static

    @property
    def of_matrix(self) -> Format:
        """The inner format."""
        return self.inner

    def own_parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Return the scale of all inputs, with static."""
        parts = self.input_format.parts((1, shape[1])) if self.static else ()
        factor = (Part("gain", (1, 1)), Part("offset", (1, 1))) if self.adaptive else ()
        return tuple(replace(part, name=_PREFIX + part.name) for part in (*parts, *factor))

    def reduce(self, W: Tensor, stats: Statistics) -> Reduction:
        """Leave the matrix as it is; fit static scales to the largest inputs.

        Raises:
            NumericsError: with static, when calibration collected no magnitudes.
        """
        own = self.fit_inputs(stats, W)

        def finish(solved: Quantized) -> Quantized:
            return replace(solved, format=self, params={**solved.params, **own})

        return Reduction(W, stats, finish)

    def fit_inputs(self, stats: Statistics, W: Tensor | None = None) -> Params:
        """Return the static parameters; none without static.

        They cover inputs of either sign up to the largest or, with `search`, leave least error in the outputs.

        Args:
            stats: of the layer.
            W: the matrix (out, columns); without it errors are those of the inputs.

        Raises:
            NumericsError: with static, when calibration collected no magnitudes or, with search, no inputs.
        """
        if not self.static:
            return {}
        if self.search:
            assert isinstance(self.inputs, StaticFormat)
            params = search_static(self.inputs, stats.required_samples(self.name), W)
        else:
            largest = stats.required_max_abs(self.name)
            params = fit_matrix(self.input_format, torch.stack([largest, -largest]), None, search=False)
        if self.adaptive:
            params |= fit_factor(self.input_format, stats.required_samples(self.name), params)
        return {_PREFIX + name: value for name, value in params.items()}

    def quantize_inputs(self, x: Tensor, params: Params) -> tuple[Quantized, Tensor]:
        """Return inputs as they are multiplied.

        Args:
            x: fp32 (tokens, columns).
            params: of the matrix; those with static are read.

        Returns:
            The inputs, zeros for tokens with NaN or Inf; and bool (tokens, 1), True for those.
        """
        broken = ~torch.isfinite(x).all(1, keepdim=True)
        x = x.masked_fill(broken, 0.0)
        fitted = {name.removeprefix(_PREFIX): v for name, v in params.items() if name.startswith(_PREFIX)}
        if self.adaptive:
            return of_tokens(self.input_format, x, fitted), broken
        return nearest_matrix(
            self.input_format, x, fitted or fit_matrix(self.input_format, x, None, self.search)
        ), broken

    def effective_inputs(self, x: Tensor, params: Params) -> Tensor:
        """Return the rounded inputs (..., columns), in the type of x."""
        flat = x.reshape(-1, x.shape[-1]).to(torch.float32)
        if not len(flat):
            return x
        kept = self.float_columns(flat)
        rounded, broken = self.quantize_inputs(flat if kept is None else flat.masked_fill(kept, 0.0), params)
        values = rounded.dequantize()
        if kept is not None:
            values = torch.where(kept, flat, values)
        return values.masked_fill(broken, torch.nan).to(x.dtype).view(x.shape)

    @property
    def learned_inputs(self) -> frozenset[str]:
        """Names of the parameters of inputs that a gradient moves: those from calibration, as numbers."""
        if not self.static or self.adaptive:
            return frozenset()
        parts = self.own_parts((1, 1))
        return frozenset(part.name for part in parts if part.bits is None and part.stored_as.is_floating_point)

    def fake_quantize_inputs(self, x: Tensor, params: Params) -> Tensor:
        """Return `effective_inputs` of finite inputs, with gradients of them and of `learned_inputs`."""
        fitted = {name.removeprefix(_PREFIX): v for name, v in params.items() if name.startswith(_PREFIX)}
        flat = x.reshape(-1, x.shape[-1]).float()
        return self.input_format.fake_quantize(flat, fitted).to(x.dtype).view(x.shape)

    def float_columns(self, x: Tensor) -> Tensor | None:
        """Return bool (columns,), True where an input reaches the threshold; None without one."""
        return (x.abs() >= self.threshold).any(0) if self.threshold else None
