"""Encoding and decoding of numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from bitmill.errors import RecipeError
from bitmill.kv.codec import TensorCodec, hadamard_rotation, normal_levels
from bitmill.kv.scheme import PAGE, Scheme, TensorScheme
from helpers.packed_cache import calibrated_at_random

HEADS, DIM = 3, 32
SIDES = [
    TensorScheme(2, "token"),
    TensorScheme(3, "token", "head"),
    TensorScheme(4, "token", 8),
    TensorScheme(8, "token"),
    TensorScheme(4, "page"),
    TensorScheme(2, "page"),
    TensorScheme(4, "static"),
    TensorScheme(3, "static", levels="learned"),
    TensorScheme(2, "static", levels="learned", outliers=0.05, q_norm=True),
    TensorScheme(3, "token", levels="learned", outliers=0.03),
    TensorScheme(3, "channel", levels="learned"),
    TensorScheme(4, "channel", levels="learned", outliers=0.02, q_norm=True),
    TensorScheme(4, "token", outliers=0.02, equalized=True),
    TensorScheme(4, "token", "head", levels="normal", rotated=True),
    TensorScheme(2, "token", "head", levels="normal"),
]
every_side = pytest.mark.parametrize("side", SIDES, ids=repr)


def coder_of(side):
    return TensorCodec.from_params(side, HEADS, DIM, calibrated_at_random(side, HEADS * DIM))


def numbers(seed=0, tokens=3 * PAGE):
    return torch.randn(2, tokens, HEADS * DIM, generator=torch.Generator().manual_seed(seed)) * 2


@every_side
def test_shapes(side):
    coder, x = coder_of(side), numbers()
    coded = coder.encode(x)
    assert coded.codes.shape == (2, 3, PAGE, HEADS * DIM)
    assert coded.codes.dtype == torch.uint8
    assert int(coded.codes.max()) < 1 << side.bits
    assert (coded.scale is None) == side.is_static
    assert coder.decode(coded).shape == x.shape


@every_side
def test_stored_parts_are_fp16(side):
    coded = coder_of(side).encode(numbers())
    for part in (coded.scale, coded.zero, coded.outlier_value):
        assert part is None or torch.equal(part, part.half().float())


@pytest.mark.parametrize("side", [s for s in SIDES if s.is_static and not s.q_norm], ids=repr)
def test_encode_decode_is_idempotent(side):
    coder = coder_of(side)
    once = coder.decode(coder.encode(numbers()))
    twice = coder.decode(coder.encode(once))
    assert torch.equal(once, twice)
    assert torch.equal(coder.encode(once).codes, coder.encode(numbers()).codes)


@pytest.mark.parametrize("side", [s for s in SIDES if s.axis != "static" and s.levels == "uniform"], ids=repr)
def test_requantize_error(side):
    coder = coder_of(side)
    once = coder.decode(coder.encode(numbers()))
    twice = coder.decode(coder.encode(once))
    assert (once - twice).abs().max() < 0.02


@pytest.mark.parametrize(
    "side", [s for s in SIDES if s.levels == "uniform" and not (s.is_static or s.outliers)], ids=repr
)
def test_uniform_error_bound(side):
    coder, x = coder_of(side), numbers()
    coded = coder.encode(x)
    _, wide = coder.normalize(coder.decode(coded))
    # fp16 rounds the scale and the zero: 15 steps are off by 15 * 2**-11 of one, and the zero by 2**-11 of itself
    assert ((coder.decode(coded) - x).abs() <= wide * (0.5 + (1 << side.bits) / 2048) + 8 / 2048).all()


@every_side
def test_pages_are_independent(side):
    coder, x = coder_of(side), numbers()
    whole = coder.decode(coder.encode(x))
    alone = coder.decode(coder.encode(x[1:, PAGE : 2 * PAGE]))
    assert torch.equal(whole[1:, PAGE : 2 * PAGE], alone)


@pytest.mark.parametrize("side", [s for s in SIDES if s.outliers], ids=repr)
def test_outliers_exact_in_fp16(side):
    coder, x = coder_of(side), numbers()
    x[0, 5, 17], x[1, 40, 0] = 900.0, -700.0
    coded, back = coder.encode(x), None
    back = coder.decode(coded)
    index = coded.outlier_index.flatten(1, 2)
    exact, stored = x.gather(-1, index), back.gather(-1, index)
    outlier_size = coded.outlier_value.flatten(1, 2).abs()
    assert ((exact - stored).abs() <= outlier_size * 2**-10 + 1e-5).all()
    assert abs(float(back[0, 5, 17]) - 900) < 1
    assert abs(float(back[1, 40, 0]) + 700) < 1
    count = side.num_outliers(HEADS * DIM)
    dense = back.scatter_add(-1, index, -coded.outlier_value.flatten(1, 2))
    worst = (x - dense).abs().topk(count + 1, -1).values
    assert (outlier_size.amin(-1) >= worst[..., -1] - 0.5).all()
    assert (index.sort(-1).values.diff(dim=-1) > 0).all()


def test_outliers_excluded_from_range():
    """Without its two largest numbers a token has a finer scale."""
    x = numbers()
    x[:, :, 3], x[:, :, 50] = 100.0, -100.0
    plain = TensorCodec.from_params(
        TensorScheme(3, "token"), HEADS, DIM, calibrated_at_random(TensorScheme(3, "token"), 96)
    )
    side = TensorScheme(3, "token", outliers=0.02)
    sparse = TensorCodec.from_params(side, HEADS, DIM, calibrated_at_random(side, 96))
    errors = [(c.decode(c.encode(x)) - x).square().mean() for c in (plain, sparse)]
    assert errors[1] < errors[0] / 50


def test_constant_numbers():
    for side in (TensorScheme(2, "token"), TensorScheme(4, "page"), TensorScheme(4, "token", 8)):
        x = torch.full((1, PAGE, HEADS * DIM), 1.5)
        coder = coder_of(side)
        assert torch.equal(coder.decode(coder.encode(x)), x)
        assert not coder.decode(coder.encode(x * 0)).any()
    normal = coder_of(TensorScheme(4, "token", "head", levels="normal"))
    assert normal.decode(normal.encode(x * 0)).abs().max() < 1e-6


def test_q_norm_levels():
    side = TensorScheme(2, "static", levels="learned", q_norm=True)
    found = calibrated_at_random(side, HEADS * DIM)
    coder = TensorCodec.from_params(side, HEADS, DIM, found)
    normal = torch.linspace(-1, 1, PAGE)[None, :, None].expand(1, PAGE, HEADS * DIM)
    coded = coder.encode(normal * found.scale + found.zero)
    nearest = (normal[..., None] - found.edges).abs().argmin(-1)
    assert torch.equal(coded.codes[0].long(), nearest)
    assert torch.equal(coder.decode(coded), found.levels[nearest] * found.scale + found.zero)


def test_lloyd_max_levels():
    """Known values: Max 1960, table 1."""
    assert normal_levels(2) == pytest.approx((-1.510, -0.4528, 0.4528, 1.510), abs=5e-4)
    assert normal_levels(3)[-1] == pytest.approx(2.152, abs=5e-4)
    assert normal_levels(4)[-1] == pytest.approx(2.733, abs=5e-4)
    x = torch.randn(400, PAGE, 64)
    side = TensorScheme(2, "token", "head", levels="normal")
    coder = TensorCodec.from_params(side, 1, 64, calibrated_at_random(side, 64))
    error = (coder.decode(coder.encode(x)) - x).square().mean()
    assert 0.112 < float(error) < 0.1175  # of a normal number; a head is scaled by its own mean square


@pytest.mark.parametrize("dim", [8, 12, 20, 64, 80, 96, 128])
def test_rotations_are_orthogonal(dim):
    turn = hadamard_rotation(dim)
    torch.testing.assert_close(turn @ turn.mT, torch.eye(dim))


def test_odd_heads_not_rotated():
    with pytest.raises(RecipeError, match="No Hadamard"):
        hadamard_rotation(7)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: TensorScheme(5, "token"),
        lambda: TensorScheme(8, "token", levels="normal"),
        lambda: TensorScheme(4, "page", 8),
        lambda: TensorScheme(4, "token", 0),
        lambda: TensorScheme(4, "token", q_norm=True),
        lambda: TensorScheme(4, "token", outliers=0.7),
        lambda: TensorScheme(4, "token", 12).num_groups(2, 64),
        lambda: Scheme(TensorScheme(4, "token"), TensorScheme(4, "page")),
        lambda: Scheme(
            TensorScheme(4, "token", "head", "normal", rotated=True), TensorScheme(4, "token"), pre_rope=True
        ),
        lambda: Scheme(TensorScheme(4, "token"), TensorScheme(4, "token"), sink=-1),
        lambda: TensorScheme(4, "channel"),
        lambda: TensorScheme(4, "token", "head", "normal", rotated=True, equalized=True),
        lambda: Scheme(TensorScheme(4, "token", equalized=True), TensorScheme(4, "token")),
    ],
)
def test_conflicting_options_refused(wrong):
    with pytest.raises(RecipeError):
        wrong()


def test_channel_groups():
    assert TensorScheme(4, "token").num_groups(3, 64) == 1
    assert TensorScheme(4, "token", "head").num_groups(3, 64) == 3
    assert TensorScheme(4, "token", 32).num_groups(3, 64) == 6
    assert TensorScheme(4, "token", outliers=0.01).num_outliers(192) == 2
    assert TensorScheme(4, "token", outliers=0.01).num_outliers(16) == 1
    assert TensorScheme(4, "token", outliers=0.01).num_outliers(math.prod((32, 128))) == 41


@pytest.mark.parametrize(
    "side", [SIDES[10], TensorScheme(4, "token", equalized=True), TensorScheme(4, "token")], ids=repr
)
def test_inverse_transform(side):
    """Also the sum of attention, as its weights add up to 1."""
    coder, x = coder_of(side), torch.randn(2, HEADS, 7, DIM)
    torch.testing.assert_close(coder.from_storage_basis(coder.to_storage_basis(x)), x, atol=1e-5, rtol=1e-5)
    weights = torch.randn(2, HEADS, 4, 7).softmax(-1)
    torch.testing.assert_close(
        coder.from_storage_basis(weights @ coder.to_storage_basis(x)), weights @ x, atol=1e-5, rtol=1e-5
    )
    assert coder.has_storage_basis == (side.rotated or side.equalized)


def test_channel_levels():
    side = TensorScheme(3, "channel", levels="learned")
    found = calibrated_at_random(side, HEADS * DIM)
    x = numbers(tokens=PAGE)
    nearest = (x[..., None] - found.levels).abs().argmin(-1)
    assert torch.equal(TensorCodec.from_params(side, HEADS, DIM, found).encode(x).codes[:, 0].long(), nearest)


def test_weighted_outliers():
    side = TensorScheme(2, "static", outliers=0.02)
    found = calibrated_at_random(side, HEADS * DIM)
    heavy = torch.ones(HEADS * DIM)
    heavy[5] = 1e6
    index = TensorCodec.from_params(side, HEADS, DIM, replace(found, weight=heavy)).encode(numbers()).outlier_index
    assert (index == 5).any(-1).all()
