// Codes of the layout (lut/layout.h), 64 at a time, with the vectors of an instruction set V.
#pragma once
#include <cstdint>

#include "../simd/inline.h"

namespace bitmill {

// Prefetches the codes read some time after these, which are `bytes` long and contiguous. Hardware prefetching stops at
// every page, and narrow codes are consumed too fast to hide its restart.
template <int bytes>
BITMILL_INLINE void prefetch(const uint8_t* codes) {
    constexpr int ahead = 2048;
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(codes + ahead + i);
}

// The bits of block i that a field of one bit a code holds, at position `at` of every byte; the others are undefined.
template <class V, int i, int at>
BITMILL_INLINE typename V::Bytes block_bits(const uint8_t* field) {
    return V::template shifted<i - at>(V::load(field));
}

// The codes of block i of a chunk; bits above the code are undefined. The 1-bit field goes to position `top`.
template <class V, int bits, int i, int top>
BITMILL_INLINE typename V::Bytes block_codes(const uint8_t* p) {
    if constexpr (bits == 8) {
        return V::load(p + 64 * i);
    } else {
        constexpr int has4 = bits & 4, has2 = bits & 2, has1 = bits & 1;
        typename V::Bytes code{};
        if constexpr (has4) code = V::template shifted<4 * (i % 2)>(V::load(p + 64 * (i / 2)));
        if constexpr (has2) {
            constexpr int at = has4;
            const auto field = V::template shifted<2 * (i % 4) - at>(V::load(p + 64 * has4 + 64 * (i / 4)));
            if constexpr (has4) code = V::template select<15>(code, field);
            else code = field;
        }
        if constexpr (has1) {
            constexpr int below = has4 + has2;
            const auto field = block_bits<V, i, top>(p + 64 * below);
            if constexpr (below) code = V::template select<(1 << below) - 1>(code, field);
            else code = field;
        }
        return code;
    }
}

}  // namespace bitmill
