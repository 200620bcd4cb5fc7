"""Dense bit packing, least significant bit first.

Code `j` of a row occupies bits `j*bits ... j*bits+bits-1` of that row's bit stream; the stream is cut into
32-bit words, lowest bits first, so a code may straddle two words and no bit is lost between codes. Only the
end of a row is padded, to a whole word. GPTQ v2, compressed-tensors (from 0.17) and a plain bit stream all
agree on this layout, which is why one packer can serve every exporter.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

MAX_BITS = 16
_WORD = 32
_MASK = 0xFFFFFFFF


def words_for(count: int, bits: int) -> int:
    """Return the number of 32-bit words that `count` codes of `bits` bits occupy.

    Args:
        count: codes in a row.
        bits: of one code.
    """
    return (count * bits + _WORD - 1) // _WORD


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes along the last axis.

    Args:
        codes: (..., n), any integer type, values in [0, 2**bits).
        bits: of one code, 1 to 16.

    Returns:
        int32 (..., ceil(n*bits/32)).

    Raises:
        ValueError: when `bits` is not in 1..16 or a code does not fit.
    """
    _check_bits(bits)
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        raise ValueError(f"codes must lie in [0, {1 << bits}), found [{int(codes.min())}, {int(codes.max())}]")
    n = codes.shape[-1]
    if bits <= 8 and n:
        return _pack_bytes(codes.to(torch.uint8), bits)
    runs = (n + _WORD - 1) // _WORD  # 32 codes fill exactly `bits` words
    padded = torch.zeros(*codes.shape[:-1], runs * _WORD, dtype=torch.int64, device=codes.device)
    padded[..., :n] = codes
    padded = padded.unflatten(-1, (runs, _WORD))
    words = torch.zeros(*codes.shape[:-1], runs, bits, dtype=torch.int64, device=codes.device)
    for j in range(_WORD):
        word, shift = divmod(j * bits, _WORD)
        words[..., word] |= (padded[..., j] << shift) & _MASK
        if shift + bits > _WORD:
            words[..., word + 1] |= padded[..., j] >> (_WORD - shift)
    words = words.flatten(-2)[..., : words_for(n, bits)]
    return torch.where(words > 0x7FFFFFFF, words - (1 << _WORD), words).to(torch.int32)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Invert `pack`.

    Args:
        words: int32 (..., w).
        bits: of one code, 1 to 16.
        count: codes in a row.

    Returns:
        Codes (..., count), uint8 up to 8 bits, int32 above.

    Raises:
        ValueError: when `words` does not hold exactly the words of `count` codes.
    """
    _check_bits(bits)
    if words.shape[-1] != words_for(count, bits):
        raise ValueError(
            f"{count} codes of {bits} bits need {words_for(count, bits)} words, found {words.shape[-1]}"
        )
    if bits <= 8:
        return _unpack_bytes(words, bits)[..., :count]
    start = torch.arange(count, device=words.device) * bits
    wide = words.to(torch.int64) & _MASK
    wide[..., :-1] |= wide[..., 1:] << _WORD  # each word with the next above it
    codes = wide.index_select(-1, start // _WORD).bitwise_right_shift_(start % _WORD).bitwise_and_((1 << bits) - 1)
    return codes.to(torch.int32)


def _period(bits: int) -> tuple[int, int]:
    """Return the least number of codes that fill whole bytes, and that number of bytes."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


def _pack_bytes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes of up to 8 bits by arithmetic on bytes, which takes a quarter of the memory of words."""
    count, wide = _period(bits)
    words = words_for(codes.shape[-1], bits)
    codes = pad(codes, (0, -codes.shape[-1] % _WORD)).unflatten(-1, (-1, count))  # 32 codes fill whole words
    packed = codes.new_zeros(*codes.shape[:-1], wide)
    for j in range(count):
        place, shift = divmod(j * bits, 8)
        packed[..., place] |= codes[..., j] << shift
        if shift + bits > 8:
            packed[..., place + 1] |= codes[..., j] >> (8 - shift)
    return packed.flatten(-2).view(torch.int32)[..., :words].contiguous()


def _unpack_bytes(words: Tensor, bits: int) -> Tensor:
    """Invert `_pack_bytes`, with the padding at the end."""
    count, wide = _period(bits)
    packed = as_bytes(words)
    runs = -(-packed.shape[-1] // wide)
    packed = pad(packed, (0, runs * wide - packed.shape[-1])).unflatten(-1, (runs, wide))
    codes = packed.new_empty(*packed.shape[:-1], count)
    for j in range(count):
        place, shift = divmod(j * bits, 8)
        torch.bitwise_right_shift(packed[..., place], shift, out=codes[..., j])
        if shift + bits > 8:
            codes[..., j] |= packed[..., place + 1] << (8 - shift)
    return codes.bitwise_and_((1 << bits) - 1).flatten(-2)


def as_bytes(words: Tensor) -> Tensor:
    """Return int32 (..., w) as uint8 (..., 4 * w), in the order of codes."""
    flat = words.reshape(-1)
    if flat.stride(0) != 1:  # a single number may count as contiguous with any stride
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).view(*words.shape[:-1], 4 * words.shape[-1])


def unpack_at(words: Tensor, bits: int, index: Tensor) -> Tensor:
    """Unpack the codes at some places of the last axis.

    Args:
        words: int32 (..., w).
        bits: of one code, 1 to 16.
        index: (n,), positions of codes.

    Returns:
        int64 (..., n).
    """
    _check_bits(bits)
    start = index * bits
    word, last = start // _WORD, words.shape[-1] - 1
    low = words.index_select(-1, word).to(torch.int64) & _MASK
    high = words.index_select(-1, (word + 1).clamp(max=last)).to(torch.int64)
    return (low | high << _WORD).bitwise_right_shift_(start % _WORD).bitwise_and_((1 << bits) - 1)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits must be 1..{MAX_BITS}, found {bits}")
