"""Which models the compiled step can run, and what it is built of: their own tensors, never copies of matrices."""

from __future__ import annotations

from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.runtime.linear import QuantLinear
from bitmill.runtime.native import is_available, native, threads

_CPU = torch.device("cpu")
_kernel_of = attrgetter("_kernel")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_HEAD_NORMS = ("q_norm", "k_norm")
_GATED = ("gate_proj", "up_proj", "down_proj")
_SILU = ("SiLU", "SiLUActivation")
# Kinds of rotary embedding whose angles depend on the position alone.
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")


class NotEligibleError(Exception):
    """One sentence that says why a model cannot use the compiled step."""


class Plan:
    """The compiled model, and what must stay as it is for it to be this model's."""

    def __init__(self, model: Any) -> None:
        """Raises NotEligibleError."""
        if not is_available():
            raise NotEligibleError("the compiled kernels are not installed")
        base, head, layers = parts_of(model)
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
        self._owners: list[Any] = []
        self._kernels: list[Any] = []
        self._tensors: list[tuple[Tensor, int]] = []
        self._hooked = [*layers, base, base.norm, head]
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
        inside = [part for layer in layers for part in (layer, layer.self_attn, layer.mlp)]
        self._parents = [module._modules for module in (model, base, base.layers, *inside)]
        self._modules = list(chain.from_iterable(map(dict.values, self._parents)))

    def advance(self, ids: Tensor, past: Tensor, length: int) -> Tensor:
        """Logits (tokens,) of what follows the token `ids` (1, 1); its keys and values join the past."""
        logits = torch.empty(self.tokens)
        row = None if self._table is not None else self.embedding(ids).to(torch.float32).view(-1)
        self.model.advance(row, self._table, int(ids), *self.angles(length), past, length, logits, threads())
        return logits

    def _rows(self, head: Any) -> Any:
        """What looks up embeddings in compiled code, where it gives what the model's own table gives."""
        tied: Any = getattr(head, "tied", None)
        if type(self.embedding) is nn.Embedding:
            table = self._linear(self.embedding, "embed_tokens")
        elif tied is self.embedding:
            table = self._linear(head, "lm_head")
        else:
            return None
        ids = torch.linspace(0, self.tokens - 1, 8).long()
        own = self.embedding(ids).to(torch.float32)
        rows = torch.tensor([table.row(int(i)) for i in ids])
        return table if rows.shape == own.shape and torch.allclose(rows, own, rtol=1e-5, atol=1e-7) else None

    def is_current(self) -> bool:
        """Whether the model is still made of what the plan was made of, and nobody listens to its layers."""
        return (
            list(chain.from_iterable(map(dict.values, self._parents))) == self._modules
            and list(map(_kernel_of, self._owners)) == self._kernels
            and all(tensor.data_ptr() == place for tensor, place in self._tensors)
            and not any(m._forward_hooks or m._forward_pre_hooks for m in self._hooked)
        )

    def angles(self, position: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines (dim,) of a position, by the model's own rotary embedding."""
        if getattr(self.rotary, "rope_type", "default") not in _FIXED_ROPE:
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
        modules = [(f"self_attn.{n}", getattr(attention, n)) for n in _PROJECTIONS]
        modules += [(f"mlp.{n}", getattr(mlp, n)) for n in _GATED]
        norms = [getattr(attention, n, None) for n in _HEAD_NORMS]
        builder.block(
            self._vector(layer.input_layernorm.weight),
            self._vector(layer.post_attention_layernorm.weight),
            [self._linear(module, name) for name, module in modules],
            [self._bias(module) for _, module in modules],
            *(None if norm is None else self._vector(norm.weight) for norm in norms),
        )

    def _linear(self, module: Any, name: str) -> Any:
        if isinstance(module, QuantLinear):
            kernel = module.kernel_on(_CPU)
            made = kernel.step_linear()
            if made is None:
                raise NotEligibleError(f"{name} is {module.format.name}, whose kernel is no compiled one")
            self._owners.append(module.tied or module)
            self._kernels.append(kernel)
            return made
        if type(module) not in (nn.Linear, nn.Embedding):
            raise NotEligibleError(f"{name} is a {type(module).__name__}")
        weight = module.weight.detach()
        if weight.device.type != "cpu" or not weight.is_contiguous():
            raise NotEligibleError(f"{name} is not a matrix in the CPU's memory")
        self._watch(module.weight)
        if weight.dtype == torch.float32:
            return native().dense_linear(weight)
        if weight.dtype == torch.bfloat16:
            return native().bf16_linear(weight.view(torch.int16))
        raise NotEligibleError(f"{name} holds {weight.dtype}")

    def _bias(self, module: Any) -> Tensor | None:
        return None if module.bias is None else self._vector(module.bias)

    def _vector(self, parameter: Tensor) -> Tensor:
        self._watch(parameter)
        return parameter.detach().to(torch.float32).contiguous()

    def _watch(self, tensor: Tensor) -> None:
        self._tensors.append((tensor, tensor.data_ptr()))


def parts_of(model: Any) -> tuple[Any, nn.Linear, list[Any]]:
    """The base model, the head and the blocks of a model that is built as Llama is. Raises NotEligibleError."""
    try:
        base, head = model.model, model.lm_head
        layers = list(base.layers)
        found = [
            _names(model) == {"model", "lm_head"},
            _names(base) == {"embed_tokens", "layers", "norm", "rotary_emb"},
            bool(layers),
        ]
        for layer in layers:
            attention = _names(layer.self_attn)
            found += [
                _names(layer) == {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
                attention in ({*_PROJECTIONS}, {*_PROJECTIONS, *_HEAD_NORMS}),
                _names(layer.mlp) == {*_GATED, "act_fn"},
                type(layer) is type(layers[0]),
            ]
    except AttributeError:
        found = [False]
    if not all(found):
        raise NotEligibleError(f"{type(model).__name__} is not built as Llama is")
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    sliding = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if kinds != {"full_attention"} or (sliding and not getattr(config, "layer_types", None)):
        raise NotEligibleError("its attention looks at a window of the past")
    if len(layers) != config.num_hidden_layers:
        raise NotEligibleError("its config names another number of blocks")
    return base, head, layers


def _names(module: nn.Module) -> set[str]:
    return {name for name, child in module.named_children()}


def _epsilon(norm: Any) -> float:
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if epsilon is None:
        raise NotEligibleError(f"its norm is a {type(norm).__name__}")
    return float(epsilon)
