"""Laws of formats, for every registered format."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.formats import FORMATS, GroupFormat, ScalarFormat
from bitmill.formats.quantized import nearest_matrix
from bitmill.numerics.grouping import grouped, grouped_importance, ungrouped
from bitmill.runtime.kernels import KernelSpec, choose_kernel
from helpers.cases import (
    all_formats,
    fitted,
    group_params,
    grouped_formats,
    rounded,
    scalar_formats,
    weight_errors,
    weights,
    with_other_counts,
)
from helpers.selection import thin

every_format = pytest.mark.parametrize("format", all_formats(), ids=repr)
every_vector_format = pytest.mark.parametrize("format", [f for f in all_formats() if f.block > 1], ids=repr)
every_scalar_format = pytest.mark.parametrize("format", scalar_formats(), ids=repr)
SHAPE = (6, 96)


def importance() -> Tensor:
    return torch.rand(96, generator=torch.Generator().manual_seed(3)) ** 3 * 10


def random_codes(format: GroupFormat) -> Tensor:
    """Codes of any numbers: all of them below 2**bits for scalar formats; vector formats may not use them all."""
    if format.block > 1:
        W = weights(seed=5)
        return format.nearest(in_groups(W, format), fitted(format, W))
    codes = torch.randint(0, 1 << format.bits, SHAPE, generator=torch.Generator().manual_seed(5))
    return grouped(codes.to(torch.uint8), format.group_size)


def in_groups(W: Tensor, format: GroupFormat) -> Tensor:
    return grouped(W, format.group_size, format.block)


def flat(format: GroupFormat, codes: Tensor) -> Tensor:
    """Grouped codes as a matrix holds them."""
    return codes.reshape(SHAPE[0], -1)[:, : format.codes_in(SHAPE[1])].contiguous()


@every_format
def test_quantize_dequantize_is_idempotent(format):
    params = fitted(format, weights())
    stored = format.decode(random_codes(format), params)
    again = format.decode(format.nearest(stored, params), params)
    assert torch.equal(ungrouped(stored, SHAPE), ungrouped(again, SHAPE))


@every_scalar_format
def test_nearest_equals_brute_force(format):
    params = fitted(format, weights())
    x = grouped(weights(seed=1), format.group_size)
    codes = format.nearest(x, params)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 1 << format.bits
    levels = format.levels(params).double()
    assert levels.shape[-1] == 1 << format.bits
    best = (x[..., None].double() - levels[..., None, :]).abs().amin(-1)
    reached = (x.double() - format.decode(codes, params).double()).abs()
    spread = float(levels.abs().max())
    assert torch.allclose(reached, best, rtol=0, atol=1e-6 * spread)  # the width of a tie in fp32


@every_scalar_format
def test_decode_equals_table_lookup(format: ScalarFormat):
    params = fitted(format, weights())
    codes = random_codes(format)
    levels = format.levels(params)
    table = levels.expand(*codes.shape[:2], levels.shape[-1])
    assert torch.equal(table.gather(-1, codes.long()), format.decode(codes, params))


@every_scalar_format
def test_rounder_equals_nearest(format):
    W = weights(seed=1)
    params = fitted(format, weights())
    expected = rounded(format, W, params)
    groups = max(v.shape[1] for v in params.values())
    width = 96 if groups == 1 else int(format.group_size)
    for column in (0, 1, 39, 40, 63, 64, 79, 80, 95):
        one = group_params(params, min(column // width, groups - 1))
        codes, values = format.rounder(one)(W[:, column])
        assert codes.shape == values.shape == (6,)
        shape = (1, 1, 6) if format.group_size == "tensor" else (6, 1, 1)
        assert torch.equal(format.decode(codes.reshape(shape), one).reshape(6), values)
        by_rounder, by_nearest = (W[:, column] - values).abs(), (W[:, column] - expected[:, column]).abs()
        assert torch.allclose(by_rounder, by_nearest, rtol=0, atol=1e-6 * float(W.abs().max()))


@every_vector_format
def test_block_rounder_equals_nearest(format):
    W, params, block = weights(seed=1), fitted(format, weights()), format.block
    expected = rounded(format, W, params)
    groups = max(v.shape[1] for v in params.values())
    for column in (0, 96 // block * block - block):
        one = group_params(params, min(column // format.width(SHAPE), groups - 1))
        w = W[:, column : column + block]
        codes, values = format.rounder(one)(w)
        assert codes.shape == (6, format.codes_per_block)
        assert values.shape == w.shape
        reached, best = (w - values).square().sum(1), (w - expected[:, column : column + block]).square().sum(1)
        assert torch.allclose(reached, best, rtol=1e-4, atol=1e-9)


@every_format
@pytest.mark.parametrize("search", [False, True], ids=["start", "search"])
def test_refit_never_raises_error(format, search):
    W, weight = weights(), importance()
    x, grouped_weight = in_groups(W, format), grouped_importance(weight, SHAPE, format.group_size, format.block)
    params = fitted(format, W, weight, search)
    for codes in (format.nearest(x, params), random_codes(format)):
        before = ((x - format.decode(codes, params)).double().square() * grouped_weight).sum()
        better = format.refit(x, codes, grouped_weight, params)
        after = ((x - format.decode(codes, better)).double().square() * grouped_weight).sum()
        assert after <= before * (1 + 1e-5)
        assert_same_params(better, read_back(format, flat(format, codes), better))


@every_format
@pytest.mark.parametrize("weighted", [False, True], ids=["even", "weighted"])
def test_search_never_raises_error(format, weighted):
    W, weight = weights(), importance() if weighted else None
    searched = weight_errors(format, W, fitted(format, W, weight, True), weight)
    start = weight_errors(format, W, fitted(format, W, weight, False), weight)
    assert searched <= start * (1 + 1e-5)


def read_back(format: GroupFormat, codes: Tensor, params: dict[str, Tensor]) -> dict[str, Tensor]:
    return format.unpack(format.pack(codes, params, SHAPE), SHAPE)[1]


def assert_same_params(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype == torch.float32, name
        assert torch.equal(one[name], other[name]), name


@every_format
@pytest.mark.parametrize("search", [False, True], ids=["start", "search"])
def test_pack_unpack_round_trip(format, search):
    params = fitted(format, weights(), importance(), search)
    codes = flat(format, format.nearest(in_groups(weights(), format), params))
    tensors = format.pack(codes, params, SHAPE)
    codes_back, params_back = format.unpack(tensors, SHAPE)
    assert torch.equal(codes, codes_back)
    assert_same_params(params, params_back)


@every_format
def test_rows_decode_separately(format):
    """Rows decode in any order and repeatedly, as an embedding table is read."""
    params = fitted(format, weights())
    tensors = format.pack(flat(format, format.nearest(in_groups(weights(), format), params)), params, SHAPE)
    whole = format.dequantize(*format.unpack(tensors, SHAPE), SHAPE)
    for rows in ([5, 0, 3, 3], [2], []):
        found = format.dequantize_rows(tensors, SHAPE, torch.tensor(rows, dtype=torch.int64))
        assert torch.equal(found, whole[rows])


@every_format
def test_stored_bits_match_packed_bytes(format):
    params = fitted(format, weights())
    codes = flat(format, random_codes(format))
    tensors = format.pack(codes, params, SHAPE)
    found = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    assert found == {name: (tuple(size), dtype) for name, (size, dtype) in format.layout(SHAPE).items()}
    assert 8 * sum(t.nbytes for t in tensors.values()) == format.stored_bits(SHAPE)


@every_format
def test_dict_and_repr_round_trip(format):
    assert FORMATS.from_dict(json.loads(json.dumps(format.to_dict()))) == format
    kind = type(format)
    assert eval(repr(format), {kind.__name__: kind}) == format
    assert hash(format) == hash(dataclasses.replace(format))


@pytest.mark.parametrize(
    "format", [f for f in all_formats() if f.groups_independent and f.group_size == 40], ids=repr
)
@pytest.mark.parametrize("search", [False, True], ids=["start", "search"])
def test_padding_does_not_affect_fit(format, search):
    W, weight = weights(), importance()
    whole = group_params(fitted(format, W, weight, search), 2)  # columns 80 to 95
    alone = fitted(format, W[:, 80:], weight[80:], search)
    errors = [weight_errors(format, W[:, 80:], params, weight[80:]) for params in (whole, alone)]
    assert torch.isclose(errors[0], errors[1], rtol=1e-4)  # sums of another length differ in the last digit
    if not search:
        assert_same_params(whole, alone)


EXTREMES = {
    "zeros": lambda: torch.zeros(SHAPE),
    "constant": lambda: torch.full(SHAPE, 0.3),
    "negative constant": lambda: torch.full(SHAPE, -0.3),
    "a zero group": lambda: torch.cat([torch.zeros(6, 80), weights()[:, :16]], 1),
    "huge": lambda: weights() * 1e6,
    "tiny": lambda: weights() * 1e-12,
    "outlier": lambda: weights().index_put((torch.tensor(2), torch.tensor(50)), torch.tensor(1000.0)),
}


@every_format
@pytest.mark.parametrize("extreme", thin(EXTREMES, ["zeros", "huge", "outlier"]))
def test_extreme_weights(format, extreme):
    W = EXTREMES[extreme]()
    for search in (False, True):
        params = fitted(format, W, importance(), search)
        decoded = rounded(format, W, params)
        assert torch.isfinite(decoded).all()
        codes = flat(format, format.nearest(in_groups(W, format), params))
        assert_same_params(params, read_back(format, codes, params))
        if extreme == "zeros":
            assert not decoded.any()
        elif extreme != "huge":  # fp16 parameters end at 65504
            assert (W - decoded).abs().max() <= 2 * W.abs().max()


@every_format
def test_zero_importance(format):
    dead = importance()
    dead[:50] = 0
    for weight in (torch.zeros(96), dead):
        assert torch.isfinite(rounded(format, weights(), fitted(format, weights(), weight))).all()


@pytest.mark.parametrize("name", grouped_formats())
def test_invalid_options_refused(name):
    wrong = [
        {"bits": 0},
        {"bits": 99},
        {"bits": "4"},
        {"bits": 2, "group_size": 0},
        {"bits": 2, "group_size": "all"},
    ]
    wrong += [{"bits": 2, "unheard_of": 1}, {}]
    for data in wrong:
        with pytest.raises(RecipeError) as caught:
            FORMATS.from_dict({"format": name, **data})
        assert str(caught.value).endswith(".")
        assert "\n" not in str(caught.value)


@every_scalar_format
def test_lookup_equals_levels(format):
    params = fitted(format, weights())
    levels, lookup = format.levels(params), format.lookup(params)
    assert lookup.tables.shape[1] == 1 << format.bits
    atol = 2.0**-23 * float(
        levels.abs().max()
    )  # a level next to 0 is a difference of two numbers that are rounded
    assert torch.allclose(lookup.levels().expand_as(levels), levels, rtol=1e-6, atol=atol)


COUNTED = [format for name in grouped_formats() for format in with_other_counts(FORMATS.get(name))]


@pytest.mark.parametrize("format", [*all_formats(), *COUNTED], ids=repr)
def test_rows_equal_those_of_the_matrix(format, monkeypatch):
    """A head in any format and with any options can be looked up, packed and by its kernel."""
    W = weights()
    matrix = nearest_matrix(format, W, fitted(format, W, search=False))
    ids, expected = torch.tensor([5, 0, 5, 3]), matrix.dequantize()
    tensors = {name: tensor.clone() for name, tensor in matrix.pack().items()}
    assert torch.equal(format.dequantize_rows(tensors, SHAPE, ids), expected[ids])
    monkeypatch.delenv("BITMILL_KERNEL", raising=False)
    spec = KernelSpec(format, SHAPE, torch.device("cpu"))
    kernel = choose_kernel(spec)(spec, tensors)
    assert torch.equal(kernel.rows(ids), expected[ids])
    with torch.no_grad():
        assert torch.allclose(kernel.apply(torch.eye(96)), expected.T, rtol=1e-3, atol=1e-3)
