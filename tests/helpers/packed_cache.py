"""A slow reference cache that dequantizes everything; calibrations of random numbers."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, DynamicLayer

from bitmill.kv.cache import QuantizedCache
from bitmill.kv.calibration_file import KVCalibration
from bitmill.kv.codec import CalibratedParams, TensorCodec
from bitmill.kv.scheme import PAGE, kv_method
from helpers.tiny_models import tiny_model

SETTINGS = [
    ("per_token", {"bits": 8}),
    ("per_token", {"bits": 4, "group": 8}),
    ("kivi", {"bits": 2, "group": 8, "residual": 64}),
    ("kvquant", {"bits": 3, "sink": 3, "residual": 0}),
    ("kvquant", {"bits": 4, "nuq": False, "outliers": 0.0, "key_outliers": 0.0, "equalize": False, "residual": 0}),
    ("kvquant", {"bits": 3, "channel_levels": False, "equalize": False, "key_outliers": 0.01, "residual": 32}),
    ("kvquant", {"bits": 2, "pre_rope": False, "per_channel": False, "q_norm": True, "residual": 0}),
    ("kvquant", {"bits": 3, "residual": 64}),
    ("rotated", {"bits": 4}),
    ("rotated", {"bits": 3, "residual": 32}),
]
WITHOUT_ROPE = [
    (name, options) for name, options in SETTINGS if options.get("pre_rope") is False or name != "kvquant"
]


def method_of(setting):
    name, options = setting
    return kv_method(name, **options)


def calibrated_at_random(side, channels, seed=0, uses_gradients=False):
    """Ranges and levels as calibration finds them for normal numbers of deviation 1 to 2."""
    generator = torch.Generator().manual_seed(seed)
    own, learned = side.axis == "channel", side.levels == "learned"
    levels = torch.linspace(-0.9, 1, 1 << side.bits) + 0.02 * torch.rand(1 << side.bits, generator=generator)
    levels = levels.sort().values
    wide = 1 + torch.rand(channels, generator=generator)
    scale = zero = mean = deviation = None
    if side.axis == "static":
        scale = wide * (1.5 if learned else 5 / (1 << side.bits))
        zero = 0.2 * torch.randn(channels, generator=generator) - (0 if learned else 4)
    if own:
        levels = levels * 3 * wide[:, None]
    if side.equalized:
        mean, deviation = torch.randn(channels, generator=generator) * 0.2, wide
    return CalibratedParams(
        scale,
        zero,
        levels if learned else None,
        levels * 0.9 if side.q_norm else None,
        torch.rand(channels, generator=generator) + 0.5 if uses_gradients and side.outliers else None,
        mean,
        deviation,
    )


def both_sides(scheme, channels, seed=0):
    return (
        calibrated_at_random(scheme.keys, channels, seed, True),
        calibrated_at_random(scheme.values, channels, seed + 1, True),
    )


def calibrated_by(side, x):
    """Return an approximate calibration of numbers (tokens, channels): their range, even levels."""
    low, high = x.amin(0), x.amax(0)
    if side.axis == "channel":
        even = torch.linspace(0, 1, 1 << side.bits)
        return CalibratedParams(levels=low[:, None] + (high - low)[:, None] * even)
    learned = side.levels == "learned"
    scale, zero = ((high - low) / 2, (low + high) / 2) if learned else ((high - low) / ((1 << side.bits) - 1), low)
    static, levels = side.axis == "static", torch.linspace(-1, 1, 1 << side.bits) if learned else None
    moved = (x.mean(0), x.std(0)) if side.equalized else (None, None)
    return CalibratedParams(scale if static else None, zero if static else None, levels, None, None, *moved)


def calibration_for(model, method):
    if not method.scheme().is_calibrated:
        return None
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = (both_sides(method.scheme(), heads * dim, 2 * n) for n in range(config.num_hidden_layers))
    return KVCalibration(method, tuple(layers))


def packed_cache(model, setting, **options):
    method = method_of(setting)
    return QuantizedCache(model, method, calibration=calibration_for(model, method), **options)


def long_model(model_type, **changes):
    sizes = {"gpt2": {"n_positions": 512}}.get(model_type, {"max_position_embeddings": 512})
    return tiny_model(model_type, **{**sizes, **changes})


class SlowLayer(DynamicLayer):
    """Floats of all tokens; each full page is encoded and decoded once."""

    def __init__(self, packed, start=None, direct=True):
        super().__init__()
        self.scheme, self.calibrated, self.rope = packed.scheme, packed.buffer.params, packed.buffer.rope
        self.window, self.start, self.direct = packed.window, start, direct
        self.packed = self.length = 0
        self.rows = None

    @property
    def is_sliding(self):
        return self.window is not None

    def append(self, keys, values):
        heads, dim = keys.shape[1], keys.shape[-1]
        sides = (self.scheme.keys, self.scheme.values)
        self.coders = [
            TensorCodec.from_params(side, heads, dim, found) for side, found in zip(sides, self.calibrated)
        ]
        self.dtype, self.is_initialized = keys.dtype, True
        if self.start is None:
            self.start = torch.zeros(keys.shape[0], dtype=torch.int64)
        states = torch.stack(
            [self.turned(x.float(), n, False).half().float() for n, x in enumerate((keys, values))]
        )
        self.rows = states if self.rows is None else torch.cat([self.rows, states], -2)
        self.length += keys.shape[-2]
        self.pack_pages(self.length - 1)

    def pack_pages(self, length):
        while length - self.packed >= self.scheme.residual + PAGE:
            self.pack_a_page()

    def turned(self, x, side, back):
        coder = self.coders[side]
        return coder.from_storage_basis(x) if back else coder.to_storage_basis(x)

    def pack_a_page(self):
        first, end = self.packed, self.packed + PAGE
        for row, begin in enumerate(self.start.tolist()):
            page = self.rows[:, row : row + 1, :, first:end].clone()
            kept = {
                s: page[..., s - first, :].clone()
                for s in range(begin, begin + self.scheme.sink)
                if first <= s < end
            }
            page[..., : max(0, min(begin, end - 1) - first), :] = page[
                ..., min(max(begin - first, 0), PAGE - 1), :
            ][..., None, :]
            positions = torch.arange(first, end)[None] - begin
            for side, coder in enumerate(self.coders):
                x = page[side]
                undone = side == 0 and self.scheme.pre_rope and self.rope is not None
                x = self.rope.undo(x, positions) if undone else x
                flat = x.transpose(1, 2).flatten(2)
                x = coder.decode(coder.encode(flat)).unflatten(-1, x.shape[1::2]).transpose(1, 2)
                page[side] = self.rope.apply(x, positions) if undone else x
            for slot, exact in kept.items():
                page[..., slot - first, :] = exact
            self.rows[:, row : row + 1, :, first:end] = page
        self.packed = end

    def floats(self, first):
        return tuple(self.turned(x[:, :, first:], side, True).to(self.dtype) for side, x in enumerate(self.rows))

    def update(self, keys, values, *args, **kwargs):
        first = self.get_mask_sizes(0)[1]
        self.pack_pages(self.length)
        past = self.floats(first) if self.length else (keys[..., :0, :], values[..., :0, :])
        self.append(keys, values)
        if self.direct and keys.shape[-2] == 1 and self.length > 1:
            return self.floats(first)
        return torch.cat([past[0], keys], -2), torch.cat([past[1], values], -2)

    def get_seq_length(self):
        return self.length

    def get_mask_sizes(self, query_length):
        first = 0 if self.window is None else max(0, self.length - self.window + 1)
        return self.length + query_length - first, first

    def crop(self, tokens_to_remove):
        self.length += tokens_to_remove
        self.rows = self.rows[..., : self.length, :]
        if self.length < self.packed:
            self.packed = self.length // PAGE * PAGE
            self.rows[..., self.packed :, :] = self.rows[..., self.packed :, :].half().float()

    def choose(self, index):
        if self.rows is not None:
            self.rows, self.start = self.rows[:, index], self.start[index]

    def reorder_cache(self, beam_idx):
        self.choose(beam_idx)

    def batch_repeat_interleave(self, repeats):
        self.choose(torch.arange(len(self.start)).repeat_interleave(repeats))

    def batch_select_indices(self, indices):
        self.choose(indices)


def slow_cache(packed, mask=None, beams=1):
    """The same as a fresh packed cache, slowly."""
    start = None if mask is None else mask.to(torch.int64).argmax(-1).repeat_interleave(beams, 0)
    return Cache(layers=[SlowLayer(layer, start, layer.is_direct) for layer in packed.layers])


NEW = 45  # tokens
ARCHITECTURES = {
    "llama": {},
    "mistral": {"sliding_window": 40},
    "qwen2": {"num_key_value_heads": 4},
    "qwen3": {"num_key_value_heads": 1},
    "gemma2": {"sliding_window": 40, "attn_logit_softcapping": None},
    "gemma3_text": {"sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "opt": {},
    "gpt2": {},
}


def prompt(rows=1, tokens=50, seed=0):
    return torch.randint(3, 128, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def padded(rows=3, tokens=50):
    ids, mask = prompt(rows, tokens), torch.ones(rows, tokens, dtype=torch.int64)
    for row in range(rows):
        mask[row, : 7 * row], ids[row, : 7 * row] = 0, 0
    return ids, mask


def generated(model, ids, cache, mask=None, **options):
    torch.manual_seed(0)
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    with torch.no_grad():
        return model.generate(ids, attention_mask=mask, past_key_values=cache, **options).tolist()


def continued(model, cache, ids, steps=20):
    logits = []
    with torch.no_grad():
        for step in range(steps):
            mask = torch.ones(ids.shape[0], cache.get_seq_length() + 1, dtype=torch.int64)
            logits.append(model(ids[:, step : step + 1], attention_mask=mask, past_key_values=cache).logits)
    return torch.cat(logits, 1)
