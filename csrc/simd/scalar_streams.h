// Streams of 32-bit words, a lane each, as plain arrays.
#pragma once
#include "scalar.h"

namespace bitmill {

struct ScalarStreams : Scalar {
    static constexpr int floats = 8;  // that fit into the registers
    static constexpr bool unrolls = false;  // loops of loops: compilers take minutes
    static BITMILL_INLINE Ints code(const uint32_t* words, int bit, int bits) {  // `bits` bits of each stream, and dirt
        Ints out;
        const uint32_t* low = words + bit / 32 * 16;
        const uint32_t* high = bit % 32 + bits > 32 ? low + 16 : low;
        for (int i = 0; i < 16; ++i)
            out.v[i] = static_cast<int32_t>((static_cast<uint64_t>(high[i]) << 32 | low[i]) >> bit % 32);
        return out;
    }
    template <int bits>
    static BITMILL_INLINE Ints masked(Ints v) {
        for (auto& word : v.v) word &= (1 << bits) - 1;
        return v;
    }
    static BITMILL_INLINE Floats larger(const Floats& x, const Floats& y) {
        return each([&](int i) { return x.v[i] > y.v[i] ? x.v[i] : y.v[i]; });
    }
    static BITMILL_INLINE float largest(const Floats& v) {
        float most = v.v[0];
        for (const float x : v.v) most = x > most ? x : most;
        return most;
    }

    // 2^n, of 1.5 * 2^23 + 127 + n.
    static BITMILL_INLINE Floats power(const Floats& v) {
        return each([&](int i) {
            uint32_t bits;
            std::memcpy(&bits, v.v + i, 4);
            bits <<= 23;
            float value;
            std::memcpy(&value, &bits, 4);
            return value;
        });
    }

    template <int bits>
    struct Numbers {  // up to 16: dirt above the code does no harm
        const float* entries;
        BITMILL_INLINE explicit Numbers(const float* sixteen) : entries(sixteen) {}
        BITMILL_INLINE Floats look(const Ints& code) const {
            return each([&](int i) { return entries[code.v[i] & ((1 << bits) - 1)]; });
        }
    };
};

}  // namespace bitmill
