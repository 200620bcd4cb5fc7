"""Packing equals an independent implementation on Python integers, for every width and odd lengths."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitmill.numerics.packing import MAX_BITS, pack, unpack, unpack_at, words_for


def words_by_integers(codes: list[int], bits: int) -> list[int]:
    """One big integer holds the row: code j at bit j*bits. Cut into signed 32-bit words, lowest first."""
    stream = sum(code << (j * bits) for j, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    words = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(count)]
    return [w - (1 << 32) if w >> 31 else w for w in words]


@st.composite
def rows_of_codes(draw):
    bits = draw(st.integers(1, MAX_BITS))
    count = draw(st.integers(1, 150))
    rows = draw(st.integers(1, 3))
    code = st.integers(0, (1 << bits) - 1)
    return bits, [draw(st.lists(code, min_size=count, max_size=count)) for _ in range(rows)]


@given(rows_of_codes())
def test_layout_is_bit_stream(case):
    bits, rows = case
    packed = pack(torch.tensor(rows), bits)
    assert packed.dtype == torch.int32
    assert packed.tolist() == [words_by_integers(row, bits) for row in rows]


@given(rows_of_codes())
def test_unpack_inverts_pack(case):
    bits, rows = case
    codes = unpack(pack(torch.tensor(rows), bits), bits, len(rows[0]))
    assert codes.tolist() == rows
    assert codes.dtype == (torch.uint8 if bits <= 8 else torch.int32)


@pytest.mark.parametrize("bits", range(1, MAX_BITS + 1))
@pytest.mark.parametrize("count", [1, 31, 32, 33, 65])
def test_extreme_codes(bits, count, nan_memory):
    top = (1 << bits) - 1
    for codes in ([top] * count, [0] * count, [top if j % 2 else 0 for j in range(count)]):
        packed = pack(torch.tensor([codes]), bits)
        assert packed[0].tolist() == words_by_integers(codes, bits)
        assert unpack(packed, bits, count)[0].tolist() == codes


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_compressed_tensors_layout(bits):
    """compressed-tensors' pack_to_int32: element j sits at bit j*bits, least significant first, of its word."""
    per_word = 32 // bits
    codes = torch.randint(0, 1 << bits, (3, 2 * per_word))
    words = pack(codes, bits).long() & 0xFFFFFFFF
    for j in range(codes.shape[1]):
        assert torch.equal((words[:, j // per_word] >> (bits * (j % per_word))) % (1 << bits), codes[:, j])


@pytest.mark.parametrize("bits", range(1, MAX_BITS + 1))
def test_random_access(bits):
    codes = torch.randint(0, 1 << bits, (3, 77))
    codes[:, -1] = (1 << bits) - 1
    index = torch.cat([torch.arange(77).flip(0), torch.tensor([0, 76, 76])])
    assert torch.equal(unpack_at(pack(codes, bits), bits, index), codes[:, index])


def test_a_known_word():
    assert pack(torch.tensor([1, 2, 3]), 3).tolist() == [1 | 2 << 3 | 3 << 6]
    assert pack(torch.tensor([15] * 8), 4).tolist() == [-1]
    assert pack(torch.tensor([0] * 10 + [7]), 3).tolist() == [-(1 << 30), 1]  # straddles two words


def test_leading_axes_and_dtypes():
    codes = torch.randint(0, 8, (2, 3, 37))
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        packed = pack(codes.to(dtype), 3)
        assert packed.shape == (2, 3, words_for(37, 3))
        assert torch.equal(unpack(packed, 3, 37).long(), codes)
    assert pack(torch.empty(2, 0, dtype=torch.uint8), 3).shape == (2, 0)
    assert pack(codes.transpose(0, 2), 3).shape == (37, 3, 1)


def test_float_parameters():
    zeros = torch.tensor([3.0, 0.0, 7.0])
    assert torch.equal(unpack(pack(zeros, 3), 3, 3).float(), zeros)


@pytest.mark.parametrize("bits", [0, -1, 17])
def test_impossible_widths_refused(bits):
    with pytest.raises(ValueError, match="bits must be"):
        pack(torch.zeros(4, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match="bits must be"):
        unpack(torch.zeros(4, dtype=torch.int32), bits, 4)


@pytest.mark.parametrize("code", [-1, 8])
def test_large_codes_refused(code):
    with pytest.raises(ValueError, match="codes must lie"):
        pack(torch.tensor([0, code]), 3)


@pytest.mark.parametrize("words", [1, 3])
def test_wrong_row_length_refused(words):
    with pytest.raises(ValueError, match="need 2 words"):
        unpack(torch.zeros(words, dtype=torch.int32), 4, 16)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_transposed_lanes(bits):
    """Words of one stream need not be neighbours in memory, even where a stream is a single word."""
    codes = torch.randint(0, 1 << bits, (5, 32 // bits), dtype=torch.uint8)
    words = pack(codes, bits).mT.contiguous()
    assert torch.equal(unpack(words.mT, bits, 32 // bits), codes)


@pytest.mark.parametrize("bits", [3, 4, 8, 11])
@pytest.mark.parametrize("shape", [(0, 40), (2, 0)])
def test_empty_input(bits, shape):
    words = pack(torch.zeros(shape, dtype=torch.int32), bits)
    assert unpack(words, bits, shape[1]).shape == shape


@pytest.mark.parametrize(("shape", "stride"), [((1, 1), (5, 5)), ((3, 1), (5, 7)), ((2, 3), (1, 6))])
def test_strided_words(shape, stride):
    words = torch.randint(1 << 30, (20,), dtype=torch.int32).as_strided(shape, stride)
    plain = words.clone(memory_format=torch.contiguous_format)
    assert torch.equal(unpack(words, 4, 8 * shape[1]), unpack(plain, 4, 8 * shape[1]))
