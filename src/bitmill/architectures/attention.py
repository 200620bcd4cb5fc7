"""Attention with rounded queries, keys, values and probabilities, as an attention implementation of transformers.

    q, k, v = Q(q), Q(k), Q(v)      p = Q(softmax(scaling q k^T + mask))      out = p v

Modules that `round_attention` has marked compute so; all others keep sdpa. A rounding may multiply its numbers as
they are stored (`Rounding.product`); otherwise they are rounded, and multiplied in floats.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bitmill.errors import RecipeError

ROUNDED = "bitmill_rounded"  # name of the implementation
SITES = ("queries", "keys", "values", "probabilities")
Contracted = Literal["columns", "rows"]  # the dimension over which a product sums

_FALLBACK = "sdpa"
_MARK = "_bitmill_attention"


class Rounding(ABC):
    """How numbers are rounded.

    Attributes:
        channels: rows are channels of a head, and columns tokens; otherwise rows are tokens.
    """

    channels: bool = False

    @abstractmethod
    def __call__(self, numbers: Tensor) -> Tensor:
        """Return numbers (rows, columns) as they are multiplied."""

    def product(
        self, a: Tensor, other: Rounding | None, b: Tensor, contracted: Contracted = "columns"
    ) -> Tensor | None:
        """Return the product of rounded numbers without decoding them; None where they multiply in floats.

        Args:
            a: (..., rows, columns).
            other: rounding of b.
            b: (..., rows of b, columns), or (..., columns, rows of b) with contracted="rows".
            contracted: dimension of b that is summed.

        Returns:
            fp32 (..., rows, rows of b).
        """
        return None


def round_attention(block: nn.Module, roundings: Mapping[str, Rounding]) -> None:
    """Let the attention modules of a block round, in place of an earlier rounding.

    Args:
        block: a block of a model that `enable_rounded_attention` has prepared.
        roundings: site -> rounding; none removes an earlier one.
    """
    for module in _attention_modules(block):
        module.__dict__.pop(_MARK, None)
        if roundings:
            module.__dict__[_MARK] = dict(roundings)


def round_attention_blocks(blocks: Sequence[nn.Module], roundings: Sequence[Mapping[str, Rounding]]) -> None:
    """Let the attention modules of each block round in their own way.

    Args:
        blocks: of a model that `enable_rounded_attention` has prepared; or the model alone, whose blocks then have
            equally many attention modules.
        roundings: of every block in order, see `round_attention`.

    Raises:
        RecipeError: the model has another number of blocks.
    """
    if len(blocks) == len(roundings):
        for block, rounding in zip(blocks, roundings):
            round_attention(block, rounding)
        return
    modules = [module for block in blocks for module in _attention_modules(block)]
    if len(blocks) > 1 or not roundings or len(modules) % len(roundings):
        raise RecipeError(
            f"The model has {len(blocks)} blocks with {len(modules)} attention modules, and the recipe rounds "
            f"those of {len(roundings)} blocks; quantize the model again."
        )
    each = len(modules) // len(roundings)
    for index, module in enumerate(modules):
        module.__dict__[_MARK] = dict(roundings[index // each])


def enable_rounded_attention(model: Any) -> None:
    """Let a model look for roundings in its attention modules.

    Raises:
        RecipeError: its attention is not called through transformers' table of attentions.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    modules = list(_attention_modules(model))
    tabled = all(hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS") for module in modules)
    used = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if not modules or not tabled or used not in (_FALLBACK, ROUNDED):
        raise RecipeError(
            f"The attention of {type(model).__name__} ({used}) cannot be rounded: only that of models that "
            "transformers runs by sdpa can; leave out attention."
        )
    ALL_ATTENTION_FUNCTIONS.register(ROUNDED, rounded_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ROUNDED, ALL_MASK_ATTENTION_FUNCTIONS[_FALLBACK])
    model.set_attn_implementation(ROUNDED)


def rounded_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention of rounded numbers.

    Args:
        module: attention module; without roundings sdpa computes.
        query: (rows, query heads, tokens, dim).
        key, value: (rows, heads, slots, dim).
        attention_mask: boolean or additive (rows, 1 or heads, tokens, slots); None for the causal one, or none.
        scaling: of the scores; 1 / sqrt(dim) without it.
        is_causal: in place of the module's own.
        kwargs: of sdpa, which ignores a cap of the scores.

    Returns:
        Output (rows, tokens, query heads, dim), and None in place of the attention weights.
    """
    roundings: Mapping[str, Rounding] | None = module.__dict__.get(_MARK)
    if roundings is None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        fallback: Any = ALL_ATTENTION_FUNCTIONS[_FALLBACK]
        named = {"scaling": scaling, "is_causal": is_causal}
        given = {name: option for name, option in named.items() if option is not None}
        found: tuple[Tensor, None] = fallback(module, query, key, value, attention_mask, **given, **kwargs)
        return found
    rows, heads, tokens, dim = query.shape
    # the query heads that share a head of keys and values are rows of one matrix
    of_head = query.reshape(rows, key.shape[1], -1, dim)
    scores = _product(roundings, "queries", of_head, "keys", key, "columns").view(rows, heads, tokens, -1)
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scores = _masked(scores, attention_mask, causal)
    sees_nothing = (scores == -torch.inf).all(-1, keepdim=True)  # padding, for which sdpa returns 0
    probabilities = scores.softmax(-1).masked_fill(sees_nothing, 0.0)
    probabilities = probabilities.reshape(rows, key.shape[1], -1, key.shape[2])
    output = _product(roundings, "probabilities", probabilities, "values", value, "rows")
    return output.view(rows, heads, tokens, -1).to(value.dtype).transpose(1, 2).contiguous(), None


def _product(
    roundings: Mapping[str, Rounding], site: str, a: Tensor, other: str, b: Tensor, contracted: Contracted
) -> Tensor:
    """Return the product of the numbers of two sites, as they are stored or rounded in floats."""
    of_a, of_b = roundings.get(site), roundings.get(other)
    if of_b is not None and of_b.channels:
        b, contracted = b.transpose(-2, -1), "columns"
    found = of_a.product(a, of_b, b, contracted) if of_a else None
    if found is None:
        a, b = _rounded(of_a, a).float(), _rounded(of_b, b).float()
        found = a @ (b.transpose(-2, -1) if contracted == "columns" else b)
    return found


def _masked(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Return scores (rows, heads, tokens, slots) of what each token may see; those of the rest are -infinity."""
    tokens, slots = scores.shape[-2:]
    if mask is None:
        if not causal or tokens == 1:
            return scores
        mask = torch.ones(tokens, slots, dtype=torch.bool, device=scores.device).tril(slots - tokens)
    mask = mask[..., :slots]
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


def _rounded(rounding: Rounding | None, numbers: Tensor) -> Tensor:
    """Return numbers (..., columns) as they are multiplied; gradients pass as if by the identity."""
    if rounding is None or not numbers.numel():
        return numbers
    flat = numbers.detach().reshape(-1, numbers.shape[-1]).float()
    rounded = rounding(flat).to(numbers.dtype).view(numbers.shape)
    return numbers + (rounded - numbers).detach() if numbers.requires_grad else rounded


def _attention_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that compute attention, which transformers names so."""
    for module in model.modules():
        if type(module).__name__.endswith("Attention") and type(module).__module__ in sys.modules:
            yield module
