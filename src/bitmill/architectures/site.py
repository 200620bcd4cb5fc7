"""Places of a model that can be quantized, named by parameter."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """A parameter, or a tensor that enters or leaves its layer, that may be quantized.

    A site names a parameter and not a module, because a module may own several matrices (the gates of a recurrent
    cell).

    path: full name of the parameter, for example "model.layers.3.mlp.down_proj.weight".
    role: the tensor of this site. "weight" is the parameter itself.
    shape: (out, in) of the matrix; rows are outputs, also where the checkpoint stores the transposed matrix.
    """

    path: str
    role: str = "weight"
    shape: tuple[int, ...] = ()

    @property
    def layer(self) -> str:
        """Path of the module that owns the parameter."""
        return self.path.rpartition(".")[0]
