"""Dense bit packing, least significant bit first.

Code `j` of a row occupies bits `j*bits ... j*bits+bits-1` of that row's bit stream; the stream is cut into
32-bit words, lowest bits first, so a code may straddle two words and no bit is lost between codes. Only the
end of a row is padded, to a whole word. GPTQ v2, compressed-tensors (from 0.17) and a plain bit stream all
agree on this layout, which is why one packer can serve every exporter.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_BITS = 16
_WORD = 32
_MASK = 0xFFFFFFFF


def words_for(count: int, bits: int) -> int:
    """Number of 32-bit words that `count` codes of `bits` bits need."""
    return (count * bits + _WORD - 1) // _WORD


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes along the last axis.

    codes: (..., n), any integer type, values in [0, 2**bits).  Returns int32 (..., ceil(n*bits/32)).
    Raises ValueError when `bits` is not in 1..16 or a code does not fit.
    """
    _check_bits(bits)
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        raise ValueError(f"codes must lie in [0, {1 << bits}), found [{int(codes.min())}, {int(codes.max())}]")
    n = codes.shape[-1]
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
    """Inverse of `pack`: int32 (..., w) to codes (..., count), uint8 up to 8 bits, int32 above.

    Raises ValueError when `words` holds fewer than `count` codes.
    """
    _check_bits(bits)
    if words.shape[-1] != words_for(count, bits):
        raise ValueError(
            f"{count} codes of {bits} bits need {words_for(count, bits)} words, found {words.shape[-1]}"
        )
    if _WORD % bits == 0:  # no code is cut
        shifts = torch.arange(0, _WORD, bits, dtype=torch.int32, device=words.device)
        codes = (words[..., None] >> shifts).bitwise_and_((1 << bits) - 1).flatten(-2)[..., :count]
        return codes.to(torch.uint8 if bits <= 8 else torch.int32)
    start = torch.arange(count, device=words.device) * bits
    wide = words.to(torch.int64) & _MASK
    wide[..., :-1] |= wide[..., 1:] << _WORD  # each word with the next above it
    codes = wide.index_select(-1, start // _WORD).bitwise_right_shift_(start % _WORD).bitwise_and_((1 << bits) - 1)
    return codes.to(torch.uint8 if bits <= 8 else torch.int32)


def unpack_at(words: Tensor, bits: int, index: Tensor) -> Tensor:
    """The codes at some places of the last axis alone: int32 (..., w) and index (n,) to int64 (..., n)."""
    _check_bits(bits)
    start = index * bits
    word, last = start // _WORD, words.shape[-1] - 1
    low = words.index_select(-1, word).to(torch.int64) & _MASK
    high = words.index_select(-1, (word + 1).clamp(max=last)).to(torch.int64)
    return (low | high << _WORD).bitwise_right_shift_(start % _WORD).bitwise_and_((1 << bits) - 1)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits must be 1..{MAX_BITS}, found {bits}")
