"""A quantized folder's model with the tensors that training changes: scales, codebooks, norms, biases.

Codes are kept as integers. Every linear layer of a block decodes its matrix when it runs, and each block is
computed again in the backward pass (`torch.utils.checkpoint`), so that the decoded matrices of one block alone are
in memory. Embedding and head are decoded once and never change.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint

from bitmill.architectures.inputs import hook_inputs
from bitmill.errors import SourceError
from bitmill.formats.base import Params
from bitmill.formats.quantized import Quantized, unpack
from bitmill.models.split import SplitModel, split_model
from bitmill.runtime.decode import detach
from bitmill.runtime.modules.dequantize import dequantize_model
from bitmill.runtime.modules.linear import QuantLinear
from bitmill.tuners.training import ScaledParameter, continuous_parts

Learn = Literal["all", "scales", "norms"]


class LearnedTensor:
    """A stored tensor that is trained in units of its size.

    The model always computes with the stored form; gradients pass the rounding as if it were the identity.

    Args:
        start: its values, fp32.
        dtype: the type in which it is stored.
    """

    def __init__(self, start: Tensor, dtype: torch.dtype) -> None:
        self.parameter, self.dtype = ScaledParameter(start), dtype

    def value(self) -> Tensor:
        """Return the stored form in fp32, with a gradient."""
        exact = self.parameter.value()
        stored = exact.detach().to(self.dtype).float()
        return stored + (exact - exact.detach()) if torch.is_grad_enabled() else stored

    @torch.no_grad()
    def stored(self) -> Tensor:
        """Return the stored form in its type."""
        return self.parameter.value().to(self.dtype)


class TrainedLinear(nn.Module):
    """A linear layer that decodes its matrix from codes and learned parts whenever it runs.

    Args:
        layer: the packed layer that it replaces.
        quantized: its matrix.
        learned: part of the format -> tensor.
    """

    def __init__(self, layer: QuantLinear, quantized: Quantized, learned: dict[str, LearnedTensor]) -> None:
        super().__init__()
        self.quantized, self.learned = quantized, learned
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias: Tensor | None
        self.register_parameter("bias", layer.bias)
        if layer.format.quantizes_inputs:
            hook_inputs(self, self._round_inputs)

    def forward(self, x: Tensor) -> Tensor:
        """Compute x (..., in) to (..., out)."""
        quantized = self.quantized
        W = quantized.format.dequantize(quantized.codes, self._params(), quantized.shape)
        return nn.functional.linear(x, W.to(x.dtype), self.bias)

    def _params(self) -> Params:
        return {**self.quantized.params, **{part: tensor.value() for part, tensor in self.learned.items()}}

    @torch.no_grad()
    def _round_inputs(self, x: Tensor) -> Tensor:
        return self.quantized.format.effective_inputs(x, self._params())


class _Value(nn.Module):
    """Lets a parameter of a module be a learned tensor."""

    def __init__(self, learned: LearnedTensor) -> None:
        super().__init__()
        self.learned = learned

    def forward(self, _: Tensor) -> Tensor:
        return self.learned.value()


class Student:
    """A quantized model and its learned tensors.

    Args:
        model: loaded from the folder, packed; it is changed in place.
        dtypes: tensor of the folder -> the type in which it is stored.
        learn: "scales" are the numbers that formats store, "norms" the norms and biases of the blocks.
        tokens: (windows, length) token ids, on which the model is tried.

    Attributes:
        learned: tensor of the folder -> learned tensor.
        vocabulary: number of logits of a position.
        fixed: format -> number of its layers that store nothing that training could change.

    Raises:
        SourceError: the model has no blocks, or does not pass hidden states of a decoder to its head.
    """

    def __init__(self, model: nn.Module, dtypes: Mapping[str, torch.dtype], learn: Learn, tokens: Tensor) -> None:
        self.learned: dict[str, LearnedTensor] = {}
        self.fixed: dict[str, int] = {}
        self._dtypes, name = dtypes, str(getattr(model, "name_or_path", "the model"))
        detach(model)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear) and not m.outside_blocks}
        self._replace_layers(model, layers, learn != "norms")
        dequantize_model(model)
        blocks = _blocks(model, layers)
        with torch.no_grad():
            split = split_model(model, tokens)
        if split is None or not blocks:
            raise SourceError(f"{name} is no decoder of blocks with a head, so it cannot be trained end to end.")
        self.split: SplitModel = split
        with torch.no_grad():
            self.vocabulary: int = split(tokens[:1, :2])[0, slice(0, 1)].shape[-1]
        if learn != "scales":
            self._replace_vectors(model)
        for block in blocks:
            _recompute(block)

    def _replace_layers(self, model: nn.Module, layers: Mapping[str, QuantLinear], trained: bool) -> None:
        paths = {id(module): name for name, module in model.named_modules()}
        for name, layer in layers.items():
            quantized = unpack(layer.format, layer.packed(), layer.shape)
            parts: dict[str, LearnedTensor] = {}
            for part in continuous_parts(quantized, shared=True) if trained else ():
                place = paths[id(layer.shared)] if part.name in layer.format.shared and layer.shared else name
                start = quantized.params[part.name]
                parts[part.name] = self._learn(f"{place}.{part.name}", start, part.dtype)
            if trained and not parts:
                self.fixed[layer.format.name] = self.fixed.get(layer.format.name, 0) + 1
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, TrainedLinear(layer, quantized, parts))

    def _replace_vectors(self, model: nn.Module) -> None:
        """Learn the norms and biases of the decoder."""
        own = {id(p) for p in self.split.decoder.parameters()}
        found = [
            (n, p) for n, p in model.named_parameters() if p.dim() == 1 and id(p) in own and n in self._dtypes
        ]
        for name, parameter in found:
            path, _, leaf = name.rpartition(".")
            learned = self._learn(name, parameter.data.float(), self._dtypes[name])
            register_parametrization(model.get_submodule(path), leaf, _Value(learned))

    def _learn(self, name: str, start: Tensor, dtype: torch.dtype) -> LearnedTensor:
        if name not in self.learned:
            self.learned[name] = LearnedTensor(start, dtype)
        return self.learned[name]

    def leaves(self) -> list[Tensor]:
        """Return the tensors that an optimizer moves."""
        return [tensor.parameter.steps for tensor in self.learned.values()]

    def state(self) -> dict[str, Tensor]:
        """Return the stored form of all learned tensors, by their names in the folder."""
        return {name: tensor.stored() for name, tensor in self.learned.items()}


def _blocks(model: nn.Module, layers: Collection[str]) -> list[nn.Module]:
    """Return the modules of the outermost lists in which layers are, such as model.layers.0 of all decoders."""
    paths = dict.fromkeys(
        ".".join(words[: k + 1])
        for words in (layer.split(".") for layer in layers)
        for k in [next((k for k, word in enumerate(words) if word.isdigit()), None)]
        if k is not None
    )
    return [model.get_submodule(path) for path in paths]


def _recompute(block: nn.Module) -> None:
    """Let a block keep nothing but its inputs for the backward pass, in which it runs again."""
    own = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return own(*args, **kwargs)
        return checkpoint(own, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    vars(block)["forward"] = forward
