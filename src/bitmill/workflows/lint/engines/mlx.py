"""mlx-lm, which reads its own checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from bitmill.workflows.lint.base import ENGINES, Described, Engine, Finding


@ENGINES.register("mlx")
class MLX(Engine):
    """Affine checkpoints."""

    name: ClassVar[str] = "mlx"
    judged: ClassVar[str] = "exports of bitmill were loaded with mlx-lm on Linux"
    target: ClassVar[str] = "mlx"

    def findings(self, model: Described) -> Iterator[Finding]:
        """Yield that another kind of checkpoint is not read."""
        if model.kind != "mlx":
            yield Finding(
                "", f"mlx-lm reads its own checkpoints and no {model.kind}; bitmill import, then export it."
            )
