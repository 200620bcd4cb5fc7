"""Memory of a process that runs a model at a context: the parts that no choice of formats changes, and layers.

    peak = program + activations of one part of a prompt + attention to the whole context in one layer
           + weights, as they are read and as kernels repack them + keys and values

in fp32, in which `bitmill.load` computes. The program is measured on this machine (`budget.peak`); weights are
those that the kernels of a small slice hold. The sum is checked by running the finished folder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch

from bitmill.evaluation.generate import PROMPT_CHUNK
from bitmill.formats import Format
from bitmill.formats.wrapper import Wrapper
from bitmill.kv.scheme import KVMethod
from bitmill.kv.size import layer_cache_size
from bitmill.models.kv_shapes import CachedLayer, cached_layers
from bitmill.models.streamed import StreamedModel
from bitmill.runtime.kernels import KernelSpec, choose_kernel
from bitmill.workflows.bench.kernels import random_packed

_FLOAT = 4  # bytes of a number
_SLICE = 64  # rows of the smaller of two layers whose kernels are made
_SPARE = 0.03  # share of the sum that the allocator holds back


@dataclass(frozen=True)
class RunningMemory:
    """Bytes of a process at a context, without what is chosen.

    Attributes:
        context: tokens of one sequence.
        program: interpreter, libraries and their buffers, measured.
        activations: of one part of a prompt, and the logits of a token.
        attention: keys and values of one layer, decoded and repeated for the query heads, and the mask.
        others: weights that are in no unit: norms, and embedding and head where they are not chosen.
        layers: shapes of the layers of the cache.
    """

    context: int
    program: int
    activations: int
    attention: int
    others: int
    layers: tuple[CachedLayer, ...]

    @property
    def fixed(self) -> int:
        """The sum of all parts."""
        return self.program + self.activations + self.attention + self.others

    def needed(self, chosen_bytes: float) -> int:
        """Return the peak with the bytes of all chosen layers, weights, keys and values."""
        return math.ceil((self.fixed + chosen_bytes) * (1 + _SPARE))

    def room(self, memory_bytes: int) -> int:
        """Return the bytes that are left for what is chosen."""
        return int(memory_bytes / (1 + _SPARE)) - self.fixed

    def cache_bits(self, method: KVMethod | None, number: int) -> int:
        """Return the bits of a layer's keys and values, tables included; None stores them in fp32."""
        if method is None:
            return 8 * _FLOAT * self.layers[number].num_elements(self.context)
        scheme = method.layer_scheme(number) if method else None
        return 8 * layer_cache_size(method, self.layers[number], 1, self.context, scheme=scheme).total


def running_memory(
    streamed: StreamedModel, context: int, program: int, units: dict[str, tuple[int, int]]
) -> RunningMemory:
    """Return the memory of a model at a context.

    Args:
        streamed: the float model; no weight is read.
        context: tokens of one sequence.
        program: measured bytes of the program.
        units: name of a layer -> shape, of all layers whose format is chosen.
    """
    config = streamed.source.config.get_text_config(decoder=True)
    layers = cached_layers(streamed.source.config, streamed.source.name)
    part = min(PROMPT_CHUNK, context)
    shapes = [(site.shape[0], site.shape[1]) for site in streamed.sites(0)]
    widths = 2 * config.hidden_size + 2 * sum(rows for rows, _ in shapes)
    decoded = max((rows * columns for rows, columns in shapes), default=0)  # where a part of a prompt needs floats
    seen = [context if layer.window is None else min(context, layer.window + part) for layer in layers]
    queries = config.num_attention_heads
    attention = max(
        _FLOAT * tokens * layer.dim * 2 * (2 * layer.heads + queries) + 5 * part * tokens
        for tokens, layer in zip(seen, layers)
    )
    everything = sum(math.prod(streamed.shape(name)) for name in streamed.names())
    others = everything - sum(math.prod(shape) for shape in units.values())
    return RunningMemory(
        context,
        program,
        _FLOAT * (part * widths + decoded + 2 * config.vocab_size),
        attention,
        _FLOAT * max(others, 0),
        layers,
    )


def loaded_bits(format: Format | None, shape: tuple[int, int]) -> int:
    """Return the bits of a layer in memory: as stored, and as its kernel repacks it; of fp32 for None.

    A file stays mapped until all of its layers are repacked, so that both may be resident.
    """
    if format is None:
        return 8 * _FLOAT * math.prod(shape)
    return format.stored_bits(shape) + _kernel_bits(format, shape)


@cache
def _kernel_bits(format: Format, shape: tuple[int, int]) -> int:
    """Return the bits that the kernel of a layer holds, those of a slice of its rows times their number."""
    core, inner = format, shape
    own = 0
    while isinstance(core, Wrapper):
        own += sum(8 * math.prod(part.packed_shape) * part.dtype.itemsize for part in core.own_parts(inner))
        inner = core.inner_shape(inner)
        core = core.inner
    rows = min(_SLICE, max(1, inner[0] // 2))
    one, two = (_held_bytes(core, (count, inner[1])) for count in (rows, 2 * rows))
    each = max(two - one, 0) / rows  # tables that all rows share are held once
    return own + math.ceil(8 * (two + each * (inner[0] - 2 * rows)))


def _held_bytes(format: Format, shape: tuple[int, int]) -> int:
    """Return the bytes of the tensors that the kernel of a matrix holds."""
    spec = KernelSpec(format, shape, torch.device("cpu"))
    kernel = choose_kernel(spec)(spec, random_packed(format, shape))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kernel.tensors.values()}
    return sum(storages.values())
