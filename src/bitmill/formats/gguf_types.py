"""The block types of GGUF as formats.

Types of 256 columns need rows that are whole blocks. For other matrices llama.cpp has a rule, which holds here
(`Format.for_columns`): IQ4_NL in place of Q2_K, Q3_K and IQ4_XS, Q5_0 of Q4_K, Q5_1 of Q5_K, and Q8_0 of Q6_K, all
in blocks of 32.

Source: llama.cpp, ggml/src/ggml-common.h; src/llama-quant.cpp for the rule.
"""

from __future__ import annotations

from bitmill.formats.affine import Affine
from bitmill.formats.base import Format, GroupFormat
from bitmill.formats.microscaling import Microscaling
from bitmill.formats.signed_scale import SignedScale
from bitmill.formats.super_block import SuperBlock
from bitmill.formats.super_block_offset import SuperBlockOffset

SMALL, SUPER = 32, 256  # columns of a block

GGUF_TYPES: dict[str, GroupFormat] = {
    "Q4_0": SignedScale(4, SMALL),
    "Q4_1": Affine(4, SMALL),
    "Q5_0": SignedScale(5, SMALL),
    "Q5_1": Affine(5, SMALL),
    "Q8_0": SignedScale(8, SMALL),
    "Q2_K": SuperBlockOffset(2, 16, scale_bits=4, groups=16),
    "Q3_K": SuperBlock(3, 16, scale_bits=6, groups=16),
    "Q4_K": SuperBlockOffset(4, 32, scale_bits=6, groups=8),
    "Q5_K": SuperBlockOffset(5, 32, scale_bits=6, groups=8),
    "Q6_K": SuperBlock(6, 16, scale_bits=8, groups=16),
    "IQ4_NL": SignedScale(4, SMALL, table_name="iq4_nl"),
    "IQ4_XS": SuperBlock(4, 32, table_name="iq4_nl", scale_bits=6, groups=8),
    "MXFP4": Microscaling(4, SMALL),
}
_NAMES: dict[Format, str] = {format: name for name, format in GGUF_TYPES.items()}


def gguf_type(format: Format) -> str | None:
    """Return the name of the type that has a format; None where none has."""
    return _NAMES.get(format)


def block_columns(kind: str) -> int:
    """Return the columns of a block of a type."""
    return SUPER if isinstance(GGUF_TYPES[kind], SuperBlock | SuperBlockOffset) else SMALL
