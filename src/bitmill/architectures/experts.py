"""The matrices of fused expert tensors as linear layers, one for each expert.

transformers stores the matrices of all experts of a layer in one tensor (experts, out, in), or (experts, in, out),
which the code of the experts indexes and multiplies: `F.linear(x, self.down_proj[expert])` or
`x @ self.down_proj[expert]`. A module takes the place of the tensor here, so that the code of the model runs as it
is and every expert is a linear layer: calibrated, quantized and packed as all others are.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_MATMUL = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class ExpertLinears(nn.Module):
    """The linear layers "expert0", "expert1", ... of a fused expert tensor.

    Attributes:
        transposed: the tensor is (experts, in, out).
        shape: of the tensor.
    """

    _is_hf_initialized = True  # transformers initializes expert tensors by name after loading

    def __init__(self, fused: Tensor, transposed: bool) -> None:
        """Make the layers, whose weights are views of the tensor.

        Args:
            fused: the tensor.
            transposed: it is (experts, in, out).
        """
        super().__init__()
        self.transposed, self.shape = transposed, fused.shape
        for expert, matrix in enumerate(fused.detach().mT if transposed else fused.detach()):
            layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(matrix, requires_grad=False)
            self.add_module(f"expert{expert}", layer)

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, expert: int | Tensor) -> ExpertWeight:
        return ExpertWeight(self.get_submodule(f"expert{int(expert)}"), self.transposed)

    def forward(self, *args: Any) -> Tensor:
        """Not called: the code of the experts indexes the module."""
        raise NotImplementedError

    def transpose(self, first: int, second: int) -> ExpertStack:
        """Return all matrices, transposed."""
        if {first % 3, second % 3} != {1, 2}:
            raise NotImplementedError(f"Axes {first} and {second} of the matrices of experts cannot be swapped.")
        return ExpertStack(self, not self.transposed)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Multiply inputs (experts, tokens, in) by all matrices, as Llama 4 does."""
        x, linears = args
        return function(x, ExpertStack(linears, linears.transposed))


class ExpertStack:
    """The matrices of all experts, which multiply by running their linear layers."""

    def __init__(self, linears: ExpertLinears, transposed: bool) -> None:
        self.linears, self.transposed = linears, transposed

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Multiply inputs (experts, tokens, in) by the matrices."""
        x, stack = args
        if function in (torch.bmm, Tensor.bmm, *_MATMUL) and stack.transposed:
            return torch.stack([layer(each) for each, layer in zip(x, stack.linears.children(), strict=True)])
        raise NotImplementedError(f"{function} of the matrices of experts is not supported.")


class ExpertWeight:
    """The matrix of one expert, which multiplies by running its linear layer."""

    def __init__(self, layer: nn.Module, transposed: bool) -> None:
        self.layer, self.transposed = layer, transposed

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Multiply an input (..., in) by the matrix."""
        x, weight, bias = [*args, None, None][:3]
        products = _MATMUL if isinstance(weight, ExpertWeight) and weight.transposed else (functional.linear,)
        if isinstance(weight, ExpertWeight) and function in products and not kwargs:
            product = weight.layer(x)
            return product if bias is None else product + bias
        raise NotImplementedError(f"{function} of the matrix of an expert is not supported.")


def fused_tensors(model: nn.Module) -> dict[str, bool]:
    """Return path of every fused expert tensor -> True where it is stored (experts, in, out)."""
    return {
        f"{path}.{name}" if path else name: is_transposed(module)
        for path, module in model.named_modules()
        if _holds_experts(path, module)
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() == 3
    }


def split_experts(model: nn.Module) -> nn.Module:
    """Replace fused expert tensors by linear layers on the meta device, in place, and return the model.

    The experts run one after another then (`experts_implementation="eager"`), whatever the config says.
    """
    for path, transposed in fused_tensors(model).items():
        owner, _, name = path.rpartition(".")
        module: Any = model.get_submodule(owner)
        fused = module._parameters.pop(name)
        module.add_module(name, ExpertLinears(fused, transposed).train(module.training))
        if hasattr(module, "is_transposed"):  # by the decorator of transformers, which chooses the implementation
            module.config = copy.deepcopy(module.config)
            module.config._experts_implementation = "eager"
    return model


def join_experts(model: nn.Module) -> nn.Module:
    """Undo `split_experts` on a model with float weights, in place, and return it."""
    for path, linears in [(p, m) for p, m in model.named_modules() if isinstance(m, ExpertLinears)]:
        owner, _, name = path.rpartition(".")
        module: Any = model.get_submodule(owner)
        weights: list[Tensor] = [layer.get_parameter("weight") for layer in linears.children()]
        stacked = torch.stack(weights)
        del module._modules[name]
        module.register_parameter(
            name, nn.Parameter(stacked.mT.contiguous() if linears.transposed else stacked, requires_grad=False)
        )
        if hasattr(module, "is_transposed") and hasattr(model, "config"):
            config: Any = model.config
            module.config = config.get_text_config()
    return model


def expert_of(layer: str) -> tuple[str, int] | None:
    """Return path of the fused tensor and number of the expert that a path of a linear layer names.

    Args:
        layer: a path such as "mlp.experts.down_proj.expert3"; None for any other one.
    """
    found = re.fullmatch(r"(.+)\.expert(\d+)", layer)
    return (found[1], int(found[2])) if found else None


def is_transposed(module: nn.Module) -> bool:
    """Return True where the fused tensors of a module are (experts, in, out).

    The decorator of transformers says so. Without it, the first tensor reads hidden states, whose width the module
    names.
    """
    stated = getattr(module, "is_transposed", None)
    if stated is not None:
        return bool(stated)
    first = next(p for p in module._parameters.values() if p is not None and p.dim() == 3)
    return getattr(module, "hidden_size", None) == first.shape[1] != first.shape[2]


def _holds_experts(path: str, module: nn.Module) -> bool:
    """Return True for a module whose 3-D parameters are the matrices of experts."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return False
    named = "expert" in path.rpartition(".")[2] or "expert" in type(module).__name__.lower()
    return named or hasattr(module, "is_transposed")
