// Levels of a trellis from a circular stream of bits: numerics/trellis.py.
#pragma once
#include <cstdint>
#include <cstring>

#include "../simd/inline.h"
#include "vector.h"

namespace bitmill {

template <class V>
struct TrellisLevels {
    static constexpr int width = trellis_block;
    const float* levels;
    int bits, state_bits;

    explicit TrellisLevels(const Vectors& w) : levels(w.table), bits(w.bits), state_bits(w.state_bits) {}

    // Levels of blocks [first, first + count) of a row: a state is the last state_bits bits read so far.
    BITMILL_INLINE void points(const uint32_t* words, int64_t first, int64_t count, float* out) const {
        const int size = 2 * bits;  // words of a block
        const uint32_t mask = (uint32_t{1} << state_bits) - 1;
        uint8_t stream[4 * (2 * 4 + 2)] = {};
        for (int64_t b = first; b < first + count; ++b, out += width) {
            std::memcpy(stream, words + b * size + size - 1, 4);  // the block's end goes before its start
            std::memcpy(stream + 4, words + b * size, 4 * size);
            for (int t = 0, place = 32 + bits - state_bits; t < width; ++t, place += bits) {
                uint32_t window;
                std::memcpy(&window, stream + place / 8, 4);
                out[t] = levels[window >> place % 8 & mask];
            }
        }
    }
};

}  // namespace bitmill
