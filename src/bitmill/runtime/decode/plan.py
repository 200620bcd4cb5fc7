"""The compiled model of the decode step, built on the tensors of the model without copies of matrices."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bitmill.native import native, threads, unsupported_reason
from bitmill.runtime.decode.angles import Angles
from bitmill.runtime.decode.families import Family
from bitmill.runtime.decode.parts import ACTIVATIONS, NotEligibleError, model_parts
from bitmill.runtime.decode.step_cache import StepCache
from bitmill.runtime.modules.embedding import QuantEmbedding
from bitmill.runtime.modules.linear import QuantLinear

_CPU = torch.device("cpu")
_kernel_of = attrgetter("kernel")


class Plan:
    """The compiled model, with the kernels and copied parameters it depends on; see also ModelGuard."""

    def __init__(self, model: Any) -> None:
        """Build the compiled model. Raises NotEligibleError if the step does not support it."""
        missing = unsupported_reason("StepAttention")
        if missing is not None:
            raise NotEligibleError(missing[:1].lower() + missing[1:].rstrip("."))
        parts = model_parts(model)
        self.family: Family = parts.family
        self.windows = parts.windows
        self._kernel_owners: list[Any] = []
        self._kernels: list[Any] = []
        self._copied: list[Tensor] = []
        config, first = model.config, parts.layers[0]
        self.heads = int(config.num_attention_heads)
        self.dim = _columns(first.get_submodule(self.family.attention_output)) // self.heads
        rows = sum(_rows(first.get_submodule(path)) for path in self.family.qkv)
        self.kv_heads = (rows // self.dim - self.heads) // 2
        self.embedding: Any = parts.base.get_submodule(self.family.embedding)
        norm = getattr(parts.base, self.family.norm, None)
        self.dtype: torch.dtype = (self.embedding if norm is None else norm).weight.dtype
        self.tokens = int(parts.head.out_features)
        self.caps_scores = any(self._score_cap(layer) for layer in parts.layers)
        self.angles = Angles(self.family, parts.base, config)
        self._copied += self.angles.frequencies
        self._positions = parts.base.get_submodule(self.family.positions) if self.family.positions else None
        if isinstance(self._positions, QuantEmbedding):
            raise NotEligibleError("its embedding of positions is quantized")
        try:
            self.model = self._build(parts, config)
        except (TypeError, ValueError) as error:
            raise NotEligibleError(f"its layers do not fit together ({error})") from None
        self._multiplier = float(getattr(config, self.family.embedding_multiplier, 1.0))
        self._table, self._factor = self._token_rows(parts.head)
        if any(tensor.is_inference() for tensor in self._copied):
            raise NotEligibleError("it was made in inference mode, where changes of parameters are not counted")
        self._versions = _versions(self._copied)

    def advance(self, ids: Tensor, past: StepCache) -> Tensor:
        """Return the logits (vocabulary,) after the token `ids` (1, 1), appending its keys and values to the
        cache.
        """
        logits = torch.empty(self.tokens)
        row = None if self._table is not None else self.embedding(ids).to(torch.float32).view(-1)
        position = None
        if self._positions is not None:
            position = self._positions.weight[past.length + self.family.position_offset].detach().float()
        angles = self.angles.at(past.length)
        start = (row, self._table, int(ids), self._factor, position, *angles)
        self.model.advance(*start, *past.arguments(), logits, threads())
        return logits

    @property
    def kernels(self) -> list[Any]:
        """The kernels of the quantized layers."""
        return self._kernels

    def inputs(self, ids: Tensor, first: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the inputs of the first block and the angles of tokens.

        Args:
            ids: Token ids (1, tokens).
            first: Position of the first one.

        Returns:
            fp32 (tokens, hidden), and cosines and sines (tokens, kinds, rotated).
        """
        rows = self.embedding(ids)[0].detach().to(torch.float32) * self._multiplier
        if self._positions is not None:
            start = first + self.family.position_offset
            rows = rows + self._positions.weight[start : start + len(rows)].detach().float()
        return rows.contiguous(), self.angles.of(first, len(rows))

    def packed_unsupported_reason(self) -> str | None:
        """Return a phrase if the step reads no packed cache of the model, or None."""
        if any(self.windows):
            return "packed caches of layers with a sliding window are left to transformers"
        return "its scores are capped, which packed caches do not support" if self.caps_scores else None

    def is_current(self) -> bool:
        """Return True if the kernels are unchanged and no copied parameter was edited.

        Edits through `.data` are not detected for copied parameters.
        """
        return (
            list(map(_kernel_of, self._kernel_owners)) == self._kernels
            and _versions(self._copied) == self._versions
            and self.angles.is_current()
        )

    def _token_rows(self, head: Any) -> tuple[Any, float]:
        """Return the compiled lookup of embeddings, or None, and the factor of its rows or the embedding's own.

        The lookup is used if it reproduces the model's own embedding of some tokens.
        """
        tied: Any = getattr(head, "tied", None)
        table = None
        if not isinstance(self.embedding, QuantEmbedding):
            if _dense_unsupported_reason(self.embedding.weight) is None:
                table = _dense_linear(self.embedding.weight)
        elif tied is self.embedding:
            table = self._linear(head, "lm_head")
        if table is None:
            return None, self._multiplier
        ids = torch.linspace(0, self.tokens - 1, 8).long()
        own = self.embedding(ids)
        scale = getattr(self.embedding, "embed_scale", None)
        factor = 1.0 if scale is None else float(scale.to(own.dtype))
        rows = torch.tensor([table.row(int(i)) for i in ids]) * factor
        limit = 1e-5 if factor == 1.0 else 2 * torch.finfo(own.dtype).eps  # the product is rounded to the type
        alike = rows.shape == own.shape and torch.allclose(rows, own.to(torch.float32), rtol=limit, atol=1e-7)
        return (table, factor * self._multiplier) if alike else (None, self._multiplier)

    def _build(self, parts: Any, config: Any) -> Any:
        family, hidden = self.family, _columns(parts.head)
        builder = native().ModelBuilder(
            hidden,
            self.heads,
            self.kv_heads,
            self.dim,
            self.angles.rotated,
            family.interleaved,
            float(getattr(config, family.logit_multiplier, 1.0))
            / float(getattr(config, family.logit_divisor, 1.0)),
            float(getattr(config, family.logit_cap, None) or 0.0),
        )
        for index, layer in enumerate(parts.layers):
            parallel = family.parallel
            experts = (self._experts(layer),) if family.experts else ()
            builder.block(
                self._attention(layer, index),
                None if experts else self._mlp(layer),
                self._norm(layer, "before_attention"),
                self._norm(layer, "after_attention"),
                self._norm(layer, "before_mlp"),
                self._norm(layer, "after_mlp"),
                parallel if isinstance(parallel, bool) else bool(getattr(layer, parallel)),
                float(getattr(layer, family.residual_multiplier, 1.0)),
                *experts,
            )
        return builder.build(self._norm(parts.base, "norm"), self._layers(parts.head, ("",)))

    def _attention(self, layer: Any, index: int) -> Any:
        family, dim = self.family, self.dim
        attention = layer.get_submodule(family.attention)
        starts = [0, dim, 2 * dim] if family.by_head else [0, self.heads * dim, (self.heads + self.kv_heads) * dim]
        return native().StepAttention(
            self._layers(layer, family.qkv),
            self._layers(layer, (family.attention_output,)),
            starts,
            3 * dim if family.by_head else dim,
            self._norm(layer, "q_norm"),
            self._norm(layer, "k_norm"),
            family.whole_norms,
            float(attention.scaling),
            self._score_cap(layer),
            self.windows[index],
            self.angles.kind_of(attention, index),
        )

    def _score_cap(self, layer: Any) -> float:
        attention = layer.get_submodule(self.family.attention)
        return float(getattr(attention, self.family.score_cap, None) or 0.0)

    def _mlp(self, layer: Any) -> Any:
        family = self.family
        inputs = self._layers(layer, family.mlp_inputs)
        output = self._layers(layer, (family.mlp_output,))
        return native().StepMlp(inputs, output, family.gated, self._activation(layer))

    def _activation(self, layer: Any) -> int:
        activation = layer.get_submodule(self.family.activation)
        if type(activation) not in ACTIVATIONS:
            raise NotEligibleError(f"its activation is {type(activation).__name__}, not SiLU, GELU or ReLU")
        return ACTIVATIONS[type(activation)]

    def _experts(self, layer: Any) -> Any:
        """Return the experts of a block: linear layers (architectures/experts.py) or parts of fused tensors."""
        if (missing := unsupported_reason("StepExperts")) is not None:
            raise NotEligibleError(missing[:1].lower() + missing[1:].rstrip("."))
        family = self.family
        router, experts = layer.get_submodule(family.router), layer.get_submodule(family.experts)
        if (unsupported := _dense_unsupported_reason(router.weight)) is not None:
            raise NotEligibleError(f"{family.router} {unsupported}")
        scores, shares = native().StepLayers(), family.normalized_shares
        scores.add(_dense_linear(router.weight), None)
        normalized = shares if isinstance(shares, bool) else bool(getattr(router, shares))
        made = native().StepExperts(scores, int(router.top_k), normalized)
        matrices = (self._expert_matrices(experts, name) for name in ("gate_up_proj", "down_proj"))
        for gate_up, down in zip(*matrices, strict=True):
            inputs, output = native().StepLayers(), native().StepLayers()
            inputs.add(gate_up, None)
            output.add(down, None)
            made.add(native().StepMlp(inputs, output, True, self._activation(layer)))
        return made

    def _expert_matrices(self, experts: Any, name: str) -> list[Any]:
        held = getattr(experts, name)
        if isinstance(held, nn.Module):
            return [self._linear(linear, f"{name}.{child}") for child, linear in held.named_children()]
        if (unsupported := _dense_unsupported_reason(held)) is not None:
            raise NotEligibleError(f"{name} {unsupported}")
        return [_dense_linear(matrix) for matrix in held.detach()]

    def _norm(self, holder: Any, part: str) -> Any:
        path = getattr(self.family, part)
        module = (
            getattr(holder.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], None) if path else None
        )
        if module is None:
            if path and part not in self.family.optional:
                raise NotEligibleError(f"{path} is missing")
            return None
        every = list(module.norms) if hasattr(module, "norms") else [module]
        centred = type(module).__name__.startswith("Layer") or "LayerNorm" in type(module).__name__
        if any(norm.weight is None for norm in every):
            raise NotEligibleError(f"{path} has no weight")
        offset = 1.0 if self.family.norm_plus_one and not centred else 0.0
        biases = [norm.bias for norm in every if getattr(norm, "bias", None) is not None]
        return native().StepNorm(
            self._vector([norm.weight for norm in every], offset),
            self._vector(biases) if biases else None,
            _epsilon(every[0]),
            centred,
        )

    def _layers(self, holder: Any, paths: tuple[str, ...]) -> Any:
        layers = native().StepLayers()
        for path in paths:
            module = holder.get_submodule(path)
            bias = None if module.bias is None else self._vector([module.bias])
            layers.add(self._linear(module, path or "lm_head"), bias)
        return layers

    def _linear(self, module: Any, name: str) -> Any:
        if type(module) is QuantLinear:
            kernel = module.kernel_on(_CPU)
            made = kernel.step_linear()
            if made is None:
                reason = module.format.uncompiled_reason(module.in_features) or "whose kernel is not compiled"
                raise NotEligibleError(f"{name} is {module.format.name}, {reason}")
            self._kernel_owners.append(module.tied or module)
            self._kernels.append(kernel)
            return made
        if type(module) not in (nn.Linear, Conv1D):
            raise NotEligibleError(f"{name} is a {type(module).__name__}")
        unsupported = _dense_unsupported_reason(module.weight)
        if unsupported is None and type(module) is Conv1D and module.weight.dtype != torch.float32:
            unsupported = f"holds {module.weight.dtype}"
        if unsupported is not None:
            raise NotEligibleError(f"{name} {unsupported}")
        if type(module) is Conv1D:
            return native().transposed_linear(module.weight.detach())
        return _dense_linear(module.weight)

    def _vector(self, parameters: list[Tensor], offset: float = 0.0) -> Tensor:
        """Return the numbers of parameters one after another in fp32, in place if they can be read there."""
        first = parameters[0]
        vector = first.detach().to(torch.float32).contiguous().view(-1)
        if len(parameters) > 1 or offset:
            vector = torch.cat([p.detach().to(torch.float32).reshape(-1) for p in parameters]) + offset
        if vector.data_ptr() != first.data_ptr():
            self._copied += parameters
        return vector


def _columns(module: Any) -> int:
    return int(module.weight.shape[0]) if type(module) is Conv1D else int(module.in_features)


def _rows(module: Any) -> int:
    return int(module.weight.shape[1]) if type(module) is Conv1D else int(module.out_features)


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
