"""The quantization scheme of one layer: weight format, solver and transforms."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from bitmill.formats import Format
from bitmill.recipes.inputs import Inputs
from bitmill.solvers import Solver
from bitmill.transforms import FormatTransform, SeamTransform, Transform


@dataclass(frozen=True)
class LayerScheme:
    """How one layer is quantized.

    Attributes:
        weight: the weight format as the recipe names it.
        solver: the solver that chooses the codes.
        transforms: exact changes of the float model, first to last.
        inputs: how the layer's inputs are rounded; None leaves them as they are.
    """

    weight: Format
    solver: Solver
    transforms: tuple[Transform, ...] = ()
    inputs: Inputs | None = None

    @cached_property
    def format(self) -> Format:
        """The format as stored: weight and inputs inside the wrappers of transforms, the first one outermost."""
        format = self.weight if self.inputs is None else self.inputs.around(self.weight)
        for transform in reversed(self.transforms):
            if isinstance(transform, FormatTransform):
                format = transform.wrap(format)
        return format

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that calibration must collect; empty for a data-free scheme."""
        return (self.solver.needs | self.format.needs).union(*(t.needs for t in self.transforms))

    @property
    def seam_transforms(self) -> tuple[SeamTransform, ...]:
        """The transforms that scale channels at the seams of a block."""
        return tuple(t for t in self.transforms if isinstance(t, SeamTransform))

    def unsupported_reason(self) -> str | None:
        """Return one sentence that explains why the parts cannot work together, or None."""
        if reason := self.solver.unsupported_reason(self.weight.core):
            return reason
        if self.inputs is not None and (reason := self.inputs.unsupported_reason(self.weight)):
            return reason
        if self.format.shared and self.solver.learner(self.weight.core, 1) is None:
            parts = ", ".join(sorted(self.format.shared))
            solver = self.solver.name
            return f"{solver} cannot learn {parts} for many layers at once; use the format without 'shared'."
        return None
