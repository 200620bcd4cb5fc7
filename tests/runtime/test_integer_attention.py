"""Attention multiplies integers: its sums equal those of the formulas in numpy, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitmill.architectures.attention import rounded_attention
from bitmill.formats.logarithm import AdaLog, Log2, LogSqrt2
from bitmill.formats.uniform import Uniform
from bitmill.recipes.attention import Attention
from bitmill.runtime.attention.integers import FormatRounding, _int8_product

GENERATOR = torch.Generator().manual_seed(6)
QUERIES, KEYS, VALUES = (torch.randn(2, 3, n, 16, generator=GENERATOR) for n in (5, 9, 9))
PROBABILITIES = torch.randn(2, 3, 5, 9, generator=GENERATOR).mul(3).softmax(-1)
ADALOG = {"scale": torch.tensor([[1.0]]), "zero": torch.tensor([[0.0]]), "base": torch.tensor([[41.0]])}


def numpy_integers(rounding, numbers):
    """Return codes as integers of numpy, and scale and zero, of one matrix (rows, columns)."""
    quantized, _ = rounding.quantize(numbers)
    codes, params, format = quantized.codes.numpy().astype(np.int64), quantized.params, rounding.format
    if isinstance(format, Uniform):
        zero = params.get("zero", torch.full_like(params["scale"], 1 << (format.bits - 1)))
        return codes, params["scale"].double().numpy(), zero.double().numpy()
    multiplier, shift = (table[0, 0].numpy() for table in format.integer_tables(params))
    longest = shift.max()
    unit = format.multiplier * 2.0**longest
    return multiplier[codes] << (longest - shift[codes]), (params["scale"] / unit).double().numpy(), 0.0


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scores_are_sums_of_integers(bits, symmetric):
    rounding = FormatRounding(Uniform(bits, "row", symmetric=symmetric))
    found = rounding.product(QUERIES, rounding, KEYS)
    for row, head in np.ndindex(2, 3):
        q, s, x = numpy_integers(rounding, QUERIES[row, head])
        k, t, y = numpy_integers(rounding, KEYS[row, head])
        sums = (q - x.astype(np.int64)) @ (k - y.astype(np.int64)).T
        assert np.array_equal(found[row, head].numpy(), (sums * s * t.T).astype(np.float32))


@pytest.mark.parametrize(
    "format", [AdaLog(3, "tensor"), AdaLog(4, "tensor"), Log2(4, "tensor"), LogSqrt2(3, "tensor")]
)
def test_outputs_are_sums_of_integers(format):
    params = {part.name: ADALOG[part.name] for part in format.parts((1, 9))}
    rounding = FormatRounding(format, params)
    of_values = FormatRounding(
        Uniform(4, "tensor"), {"scale": torch.tensor([[0.3]]), "zero": torch.tensor([[7.0]])}
    )
    found = rounding.product(PROBABILITIES, of_values, VALUES, "rows")
    for row, head in np.ndindex(2, 3):
        p, s, _ = numpy_integers(rounding, PROBABILITIES[row, head])
        v, t, y = numpy_integers(of_values, VALUES[row, head])
        sums = p @ (v - y.astype(np.int64))  # 64-bit integers
        assert np.array_equal(found[row, head].numpy(), (sums * s * t).astype(np.float32))


def attention(*sizes: str, channels: bool) -> Attention:
    uniform = [Uniform(8, size) for size in sizes]
    of_channels = frozenset({"values"} if channels else ())
    return Attention(uniform[0], uniform[1], uniform[2], Uniform(8, "row"), channels=of_channels)


class Module(torch.nn.Module):
    is_causal = False


@pytest.mark.parametrize(("queries", "channels"), [(3, False), (6, False), (6, True)])
def test_integers_equal_rounded_floats(queries, channels):
    module, query = Module(), QUERIES.repeat_interleave(queries // 3, 1)
    module.__dict__["_bitmill_attention"] = attention(
        "row", "tensor", "row" if channels else "tensor", channels=channels
    ).roundings()
    with torch.no_grad():
        found, _ = rounded_attention(module, query, KEYS, VALUES, None)
    floats, _ = rounded_attention(module, query.requires_grad_(), KEYS, VALUES, None)
    torch.testing.assert_close(found, floats.detach(), atol=1e-5, rtol=1e-5)
    floats.sum().backward()
    assert query.grad is not None


@pytest.mark.parametrize(
    ("mine", "other", "contracted", "reason"),
    [
        (Uniform(8, "row"), Uniform(8, "row"), "rows", "several scales"),
        (Uniform(8, 8), Uniform(8, "row"), "columns", "several scales"),
        (AdaLog(4, "tensor"), AdaLog(4, "tensor"), "columns", "no kernel"),
        (Uniform(8, "row", zero="float"), Uniform(8, "row"), "columns", "no kernel"),
    ],
)
def test_numbers_without_integers_multiply_in_floats(mine, other, contracted, reason):
    assert reason in FormatRounding(mine).float_reason(FormatRounding(other), contracted)
    assert FormatRounding(mine).product(KEYS, FormatRounding(other), KEYS, contracted) is None


def test_broken_numbers_stay_visible():
    rounding, of_values = FormatRounding(Uniform(8, "row")), FormatRounding(Uniform(8, "tensor"))
    broken, values = KEYS.clone(), VALUES.clone()
    broken[0, 1, 2, 3], values[1, 0, 4, 5] = torch.nan, torch.inf
    scores = torch.isnan(rounding.product(QUERIES, rounding, broken))
    assert scores.sum() == scores[0, 1, :, 2].sum() == 5
    outputs = torch.isnan(rounding.product(PROBABILITIES, of_values, values, "rows"))
    assert outputs.sum() == outputs[1, 0].sum() == 5 * 16


def test_torch_multiplies_bytes_exactly():
    a, b = (torch.randint(-128, 128, (n, 33), dtype=torch.int8, generator=GENERATOR) for n in (7, 11))
    assert torch.equal(_int8_product()(a, b.T), a.int() @ b.int().T)
