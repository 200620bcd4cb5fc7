"""AdaLog: logarithms, with a base for each layer, for what vision transformers compute by softmax and GELU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bitmill.formats import FORMATS, Format
from bitmill.formats.uniform import Uniform
from bitmill.numerics.grouping import GroupSize
from bitmill.recipes.attention import Attention
from bitmill.recipes.inputs import Inputs
from bitmill.recipes.method import METHODS, Method, option
from bitmill.recipes.recipe import Recipe
from bitmill.recipes.rules import Rule
from bitmill.solvers.gptq import GPTQ
from bitmill.solvers.nearest import Nearest
from bitmill.transforms.smooth import SmoothQuant
from bitmill.tuners.base import Tuner
from bitmill.tuners.reconstruct import Reconstruct

_BEHIND_GELU = "*.fc2"  # name of the layers that read GELU, in vision transformers


@METHODS.register("adalog")
@dataclass(frozen=True)
class AdaLogMethod(Method):
    """AdaLog: weights and all activations of a vision transformer at a few bits.

    Problem    probabilities of attention and outputs of GELU follow a power law: most are tiny, few large ones
               decide, and evenly spaced levels, or powers of a base that is the same everywhere, fit neither
    Equation   x^ = s m(k) / M 2^-e(k) - s z,  e = floor(k q / 37),  m = round(M 2^(-(k q mod 37) / 37)),  code
               2^bits - 1 for 0;  an integer decoder multiplies by m and shifts right by e
    Symbols    k code, s scale, q base of a layer (2^(q / 37)), s z the size of the smallest number (0.17 of GELU)
    Needs      calibration pictures
    Stored     codes and fp16 scale a row of weights; scale and zero, or scale, zero and base, a layer
    Cost       seconds a block; with reconstruct, iters forward and backward passes of 512 patches a block
    Expect     the largest gain over uniform where probabilities and GELU have few bits
    Limits     integers multiply, in linear layers and in attention; with values=token probabilities and values are
               rounded, and multiplied in floats. Queries and keys have scales of their own for every token and
               head, values for every channel and head. Channels are scaled behind norms, without the paper's
               shifts
    Paper      Wu et al. 2024 (arXiv 2407.12951)
    """

    bits: int = option(4, "bits of a weight, 1 to 8")
    act_bits: int = option(4, "bits of activations, 1 to 8")
    log: Literal["adalog", "log2", "log_sqrt2", "uniform"] = option(
        "adalog", "format of probabilities and of inputs behind GELU; the others for comparison"
    )
    log_bits: int = option(0, "bits of probabilities and of inputs behind GELU, 1 to 8; 0 for act_bits")
    group_size: GroupSize = option("row", "input columns that share a scale of weights, or 'row' or 'tensor'")
    solver: Literal["gptq", "nearest"] = option("nearest", "how weights are rounded")
    values: Literal["channel", "token"] = option(
        "channel", "what has a scale of values in every head: with that of a channel integers multiply"
    )
    fold: bool = option(True, "scale channels behind norms to equal ranges (RepQ-ViT)")
    reconstruct: Literal["none", "plain", "fisher"] = option(
        "none",
        "learn the rounding of each block, by the error of its outputs or by the Fisher information (FIMA-Q)",
    )
    iters: int = option(500, "steps a block of the reconstruction")
    minutes: float = option(0.0, "of a clock for the reconstruction of all blocks; 0 for no limit")

    def recipe(self) -> Recipe:
        """Return a recipe: uniform weights and inputs, logarithms behind GELU and the softmax."""
        behind_gelu = Inputs(self._behind(), static=True, search=True)
        return Recipe(
            "adalog" if self.log == "adalog" else f"adalog-{self.log.replace('_', '-')}",
            Uniform(self.bits, self.group_size),
            GPTQ() if self.solver == "gptq" else Nearest(search=True),
            (SmoothQuant(alpha=1.0),) if self.fold else (),
            rules=(Rule(_BEHIND_GELU, inputs=behind_gelu, optional=True),),
            tuners=self._tuners(),
            inputs=Inputs(Uniform(self.act_bits, "tensor"), static=True, search=True),
            attention=self._attention(),
        )

    def _attention(self) -> Attention:
        """Return the formats of what attention multiplies."""
        token = Uniform(self.act_bits, "row")
        channels = frozenset({"values"} if self.values == "channel" else ())
        static = frozenset({"probabilities"})
        return Attention(token, token, token, self._behind(), static=static, channels=channels)

    def _tuners(self) -> tuple[Tuner, ...]:
        """Return the reconstruction, if there is one."""
        if self.reconstruct == "none":
            return ()
        return (Reconstruct(self.iters, self.minutes, fisher=self.reconstruct == "fisher"),)

    def _behind(self) -> Format:
        """Return the format behind softmax and GELU, with one set of parameters."""
        data = {"format": self.log, "bits": self.log_bits or self.act_bits, "group_size": "tensor"}
        format: Format = FORMATS.from_dict(data)
        return format
