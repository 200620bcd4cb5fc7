"""The contract of a solver: a pure function from a matrix, statistics and a format to a `Quantized`.

Laws (tests/conformance/test_solvers.py): on seeded cases a solver's own objective is no worse than nearest
rounding's; the result is deterministic; every scalar format is accepted or refused with a reason.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor

from bitmill.errors import NumericsError, RecipeError
from bitmill.fields import check_types
from bitmill.formats import Format
from bitmill.quantized import Quantized
from bitmill.registry import Registry

Needs = Literal["nothing", "gram"]

SOLVERS: Registry[type[Solver]] = Registry("solver", "bitmill.solvers")


@dataclass(frozen=True)
class Statistics:
    """What calibration knows of one layer's inputs X (tokens, columns).

    gram: X^T X / tokens, fp32 (columns, columns), or None for a data-free run.
    """

    gram: Tensor | None = None
    tokens: int = 0

    @property
    def importance(self) -> Tensor | None:
        """Mean square of every input, (columns,): the weight of a squared weight error in that column."""
        return None if self.gram is None else self.gram.diagonal()

    def required_gram(self, solver: str) -> Tensor:
        """The Gram matrix. Raises NumericsError, naming the solver that needs it, when there is none."""
        if self.gram is None:
            raise NumericsError(
                f"{solver} needs the Gram matrix of the layer's inputs; run it with calibration text."
            )
        return self.gram


@dataclass(frozen=True)
class Solver(ABC):
    """Base of all solvers: a frozen dataclass of options."""

    def __post_init__(self) -> None:
        check_types(self, type(self).__name__)

    @property
    def name(self) -> str:
        """The registered name."""
        return SOLVERS.name_of(self)

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """The statistics that calibration must collect."""

    def accepts(self, format: Format) -> str | None:
        """None, or one sentence that says why this format cannot be solved here."""
        return None

    @abstractmethod
    def solve(self, W: Tensor, stats: Statistics, format: Format) -> Quantized:
        """Quantize W, fp32 (rows, columns)."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `solver_from_dict` turns back into an equal solver."""
        return {"solver": self.name, **asdict(self)}


def solver_from_dict(data: dict[str, Any]) -> Solver:
    """The solver described by `Solver.to_dict`. Raises RecipeError on unknown names or fields."""
    fields = dict(data)
    name = fields.pop("solver", None)
    if not isinstance(name, str):
        raise RecipeError(f"A solver needs the field 'solver' with its name; found {data!r}.")
    kind = SOLVERS.get(name)
    try:
        return kind(**fields)
    except TypeError as error:
        raise RecipeError(f"The solver {name!r} cannot be built from {fields!r}: {error}.") from None


def output_error(W: Tensor, W_hat: Tensor, gram: Tensor | None) -> float:
    """Relative squared error of the layer's output, tr(D G D^T) / tr(W G W^T); of the weights without a Gram."""
    D = W - W_hat
    if gram is None:
        return float(D.square_().sum() / W.square().sum().clamp(min=1e-30))
    return float((D @ gram).mul_(D).sum() / (W @ gram).mul_(W).sum().clamp(min=1e-30))
