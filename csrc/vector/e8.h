// Points of the lattice E8 from 16-bit codes: numerics/e8.py says what the bits mean.
#pragma once
#include <cstdint>
#include <cstring>

#include "../simd/inline.h"
#include "vector.h"

namespace bitmill {

template <class V>
struct E8 {
    static constexpr int width = 8;
    const float* patterns;
    uint8_t odd[256];  // whether the sum of a pattern is

    explicit E8(const Vectors& w) : patterns(w.table) {
        for (int p = 0; p < 256; ++p) {
            float sum = 0;
            for (int i = 0; i < width; ++i) sum += patterns[p * width + i];
            odd[p] = static_cast<int>(sum) & 1;
        }
    }

    // Points of blocks [first, first + count) of a row.
    BITMILL_INLINE void points(const uint32_t* words, int64_t first, int64_t count, float* out) const {
        for (int64_t b = first; b < first + count; ++b, out += width) {
            const uint32_t code = words[b / 2] >> 16 * (b % 2) & 0xffff, pattern = code & 255;
            uint32_t negative = code >> 8 & 127;
            uint32_t parity = negative ^ negative >> 4;
            parity ^= parity >> 2;
            parity ^= parity >> 1;
            negative |= ((parity ^ odd[pattern]) & 1) << 7;
            const float shift = code >> 15 ? 0.25f : -0.25f;
            uint32_t signs[width];
            std::memcpy(signs, patterns + pattern * width, sizeof signs);
            for (uint32_t i = 0; i < width; ++i) signs[i] ^= negative << (31 - i) & 0x80000000u;
            float values[width];
            std::memcpy(values, signs, sizeof values);
            for (int i = 0; i < width; ++i) out[i] = values[i] + shift;
        }
    }
};

}  // namespace bitmill
