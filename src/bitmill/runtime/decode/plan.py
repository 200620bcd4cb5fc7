"""The compiled model of the decode step, built on the tensors of the model without copies of matrices."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.runtime.decode.parts import GATED, HEAD_NORMS, PROJECTIONS, NotEligibleError, model_parts
from bitmill.runtime.decode.step_cache import StepCache
from bitmill.runtime.modules.linear import QuantLinear
from bitmill.runtime.native import is_available, native, threads

_CPU = torch.device("cpu")
_kernel_of = attrgetter("kernel")
_SILU = ("SiLU", "SiLUActivation")
# Kinds of rotary embedding whose angles depend on the position only.
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")


class Plan:
    """The compiled model, with the kernels and copied parameters it depends on; see also ModelGuard."""

    def __init__(self, model: Any) -> None:
        """Build the compiled model. Raises NotEligibleError if the step does not support it."""
        if not is_available():
            raise NotEligibleError("the compiled kernels are not installed")
        base, head, layers = model_parts(model)
        attention, mlp = layers[0].self_attn, layers[0].mlp
        self.blocks, self.dim = len(layers), int(attention.head_dim)
        self.heads = int(attention.q_proj.out_features) // self.dim
        self.kv_heads = int(attention.k_proj.out_features) // self.dim
        if type(mlp.act_fn).__name__ not in _SILU:
            raise NotEligibleError(f"its activation is {type(mlp.act_fn).__name__}, not SiLU")
        self.embedding: Any = model.get_input_embeddings()
        self.rotary: Any = base.rotary_emb
        self.dtype: torch.dtype = base.norm.weight.dtype
        self.tokens = int(head.out_features)
        self._kernel_owners: list[Any] = []
        self._kernels: list[Any] = []
        self._copied: list[Tensor] = []
        hidden = int(attention.q_proj.in_features)
        builder = native().ModelBuilder(
            hidden, self.heads, self.kv_heads, self.dim, _epsilon(base.norm), float(attention.scaling)
        )
        try:
            for layer in layers:
                self._block(builder, layer)
            self.model = builder.build(
                self._vector(base.norm.weight), self._linear(head, "lm_head"), self._bias(head)
            )
        except (TypeError, ValueError) as error:
            raise NotEligibleError(f"its layers do not fit together ({error})") from None
        self._angles: tuple[Tensor, Tensor] | None = None
        self._table = self._rows(head)
        self._fixed = getattr(self.rotary, "rope_type", "default") in _FIXED_ROPE
        self._frequencies = self.rotary.inv_freq
        if self._fixed and not self._frequencies.is_inference():
            self._copied.append(self._frequencies)
        if any(tensor.is_inference() for tensor in self._copied):
            raise NotEligibleError("it was made in inference mode, where changes of parameters are not counted")
        self._versions = _versions(self._copied)

    def advance(self, ids: Tensor, past: StepCache) -> Tensor:
        """Return the logits (vocabulary,) after the token `ids` (1, 1), appending its keys and values to the
        cache.
        """
        logits = torch.empty(self.tokens)
        row = None if self._table is not None else self.embedding(ids).to(torch.float32).view(-1)
        angles = self.angles(past.length)
        self.model.advance(row, self._table, int(ids), *angles, *past.arguments(), logits, threads())
        return logits

    def _rows(self, head: Any) -> Any:
        """Return the compiled lookup of embeddings if it reproduces the model's table on some rows, or None."""
        tied: Any = getattr(head, "tied", None)
        table = None
        if type(self.embedding) is nn.Embedding:
            if _dense_unsupported_reason(self.embedding.weight) is None:
                table = _dense_linear(self.embedding.weight)
        elif tied is self.embedding:
            table = self._linear(head, "lm_head")
        if table is None:
            return None
        ids = torch.linspace(0, self.tokens - 1, 8).long()
        own = self.embedding(ids).to(torch.float32)
        rows = torch.tensor([table.row(int(i)) for i in ids])
        return table if rows.shape == own.shape and torch.allclose(rows, own, rtol=1e-5, atol=1e-7) else None

    def is_current(self) -> bool:
        """Return True if the kernels are unchanged and no copied parameter was edited.

        Edits through `.data` are not detected for copied parameters.
        """
        return (
            list(map(_kernel_of, self._kernel_owners)) == self._kernels
            and _versions(self._copied) == self._versions
            and (not self._fixed or self.rotary.inv_freq is self._frequencies)
        )

    def angles(self, position: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (dim,) of a position, from the model's rotary embedding."""
        if not self._fixed:
            cos, sin = self._rotate(torch.tensor([[position]]))
            return cos[0], sin[0]
        if self._angles is None or position >= len(self._angles[0]):
            count = max(256, 1 << position.bit_length())
            self._angles = self._rotate(torch.arange(count)[None])
        cos, sin = self._angles
        return cos[position], sin[position]

    def _rotate(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotary(torch.empty(0), position_ids=positions)
        if cos.shape[-1] != self.dim:
            raise NotEligibleError(f"it rotates {cos.shape[-1]} of {self.dim} numbers of a head")
        return cos[0].contiguous(), sin[0].contiguous()

    def _block(self, builder: Any, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        modules = [(f"self_attn.{n}", getattr(attention, n)) for n in PROJECTIONS]
        modules += [(f"mlp.{n}", getattr(mlp, n)) for n in GATED]
        norms = [getattr(attention, n, None) for n in HEAD_NORMS]
        builder.block(
            self._vector(layer.input_layernorm.weight),
            self._vector(layer.post_attention_layernorm.weight),
            [self._linear(module, name) for name, module in modules],
            [self._bias(module) for _, module in modules],
            *(None if norm is None else self._vector(norm.weight) for norm in norms),
        )

    def _linear(self, module: Any, name: str) -> Any:
        if type(module) is QuantLinear:
            kernel = module.kernel_on(_CPU)
            made = kernel.step_linear()
            if made is None:
                raise NotEligibleError(f"{name} is {module.format.name}, whose kernel is not compiled")
            self._kernel_owners.append(module.tied or module)
            self._kernels.append(kernel)
            return made
        if type(module) is not nn.Linear:
            raise NotEligibleError(f"{name} is a {type(module).__name__}")
        reason = _dense_unsupported_reason(module.weight)
        if reason is not None:
            raise NotEligibleError(f"{name} {reason}")
        return _dense_linear(module.weight)

    def _bias(self, module: Any) -> Tensor | None:
        return None if module.bias is None else self._vector(module.bias)

    def _vector(self, parameter: Tensor) -> Tensor:
        vector = parameter.detach().to(torch.float32).contiguous()
        if vector.data_ptr() != parameter.data_ptr():
            self._copied.append(parameter)
        return vector


def _dense_unsupported_reason(weight: Tensor) -> str | None:
    """Return None if compiled code multiplies with a float weight, or a phrase with the reason."""
    if weight.device.type != "cpu":
        return "is not in the CPU's memory"
    if not weight.is_contiguous():
        return "is not contiguous, row by row"
    return None if weight.dtype in (torch.float32, torch.bfloat16) else f"holds {weight.dtype}"


def _dense_linear(weight: Tensor) -> Any:
    weight = weight.detach()
    if weight.dtype == torch.float32:
        return native().dense_linear(weight)
    return native().bf16_linear(weight.view(torch.int16))


def _versions(tensors: list[Tensor]) -> list[int]:
    """Return the number of in-place changes of each tensor."""
    return [tensor._version for tensor in tensors]


def _epsilon(norm: Any) -> float:
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if epsilon is None:
        raise NotEligibleError(f"its norm is a {type(norm).__name__}")
    return float(epsilon)
