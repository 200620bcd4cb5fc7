// Points of the lattice E8 from 16-bit codes: the bits are described in numerics/e8.py.
#pragma once
#include <cstdint>

#include "../simd/inline.h"
#include "vector.h"

namespace bitmill {

template <class V>
struct E8 {
    static constexpr int width = 8;
    const float* patterns;
    float signs[256][width];  // by their bits
    uint8_t odd[256];         // bit 7: whether the sum of a pattern is, which decides the last sign

    explicit E8(const Vectors& w) : patterns(w.table) {
        for (int b = 0; b < 256; ++b) {
            float sum = 0;
            for (int i = 0; i < width; ++i) {
                signs[b][i] = b >> i & 1 ? -1.0f : 1.0f;
                sum += patterns[b * width + i];
            }
            odd[b] = static_cast<uint8_t>((static_cast<int>(sum) & 1) << 7);
        }
    }

    // Points of blocks [first, first + count) of a row.
    BITMILL_INLINE void points(const uint32_t* words, int64_t first, int64_t count, float* out) const {
        for (int64_t b = first; b < first + count; ++b, out += width) {
            const uint32_t code = words[b / 2] >> 16 * (b % 2) & 0xffff;
            uint32_t negative = code >> 8 & 127, parity = negative ^ negative << 4;
            parity ^= parity << 2;
            parity ^= parity << 1;  // bit 7: of all seven
            negative |= (parity ^ odd[code & 255]) & 128;
            const float shift = code >> 15 ? 0.25f : -0.25f;
            const float *pattern = patterns + (code & 255) * width, *sign = signs[negative];
            for (int i = 0; i < width; ++i) out[i] = pattern[i] * sign[i] + shift;
        }
    }
};

}  // namespace bitmill
