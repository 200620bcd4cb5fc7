"""Whether a model's keys and values can be packed, and what that takes, without running it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from bitmill.errors import UsageError
from bitmill.kv.codec import hadamard_rotation
from bitmill.kv.page import PageLayout
from bitmill.kv.rope import attentions, rope_for
from bitmill.kv.scheme import PAGE, KVMethod
from bitmill.kv.size import calibrated_numbers
from bitmill.models.kv_shapes import kv_heads_and_dim
from bitmill.tasks.base import task_for

_FP32 = 4


def packed_shapes(model: nn.Module, name: str = "") -> dict[int, tuple[int, int]]:
    """Layer -> (heads, dim) of the keys and values that are packed; meta parameters suffice.

    Raises UsageError where there are none: for encoders, and for layers of other kinds alone.
    """
    config: Any = getattr(model, "config", None)
    name = name or type(model).__name__
    task = task_for(config)
    if config is None or not task.generates:
        raise UsageError(f"{name} is {task.description}, which keeps no keys and values; leave out --kv.")
    try:
        layers = DynamicCache(config=config).layers
    except (
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
    ):  # a config without layers as transformers counts them
        layers = []
    modules, found = attentions(model), {}
    for number, layer in enumerate(layers):
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            heads, dim = kv_heads_and_dim(config.get_text_config(decoder=True), name)
            found[number] = heads, int(getattr(modules.get(number), "head_dim", None) or dim)
    if not found:
        raise UsageError(f"{name} has no layer with keys and values that could be packed; leave out --kv.")
    return found


def check(model: nn.Module, method: KVMethod, name: str = "") -> None:
    """Raises UsageError or RecipeError for a method that the model's keys and values do not go together with."""
    scheme = method.scheme()
    for number, (heads, dim) in packed_shapes(model, name).items():
        PageLayout(scheme, heads, dim)
        if scheme.keys.rotated or scheme.values.rotated:
            hadamard_rotation(dim)
        rope_for(model, scheme, number)


def page_bits(model: nn.Module, method: KVMethod) -> float:
    """Bits that full pages take, over the numbers in them: what a long context comes to."""
    shapes = packed_shapes(model).values()
    words = sum(PageLayout(method.scheme(), heads, dim).words for heads, dim in shapes)
    return 32 * words / sum(2 * PAGE * heads * dim for heads, dim in shapes)


def calibration_bytes(model: nn.Module, method: KVMethod) -> int:
    """What the tensors of a calibration take; 0 for a method without one."""
    scheme, shapes = method.scheme(), packed_shapes(model).values()
    sides = (scheme.keys, scheme.values)
    return _FP32 * sum(calibrated_numbers(s, h * d, method.weighs_errors) for h, d in shapes for s in sides)
