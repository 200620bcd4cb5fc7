// Streams of 32-bit words, a lane each, as plain arrays.
#pragma once
#include "scalar.h"

namespace bitmill {

struct ScalarStreams : Scalar {
    static constexpr int floats = 8;  // that fit into the registers
    static BITMILL_INLINE Ints words(const uint32_t* p) {
        Ints out;
        std::memcpy(out.v, p, 64);
        return out;
    }
    template <int by>
    static BITMILL_INLINE Ints moved(Ints v) {  // right, left where negative
        for (auto& word : v.v) {
            const uint32_t bits = static_cast<uint32_t>(word);
            word = static_cast<int32_t>(by >= 0 ? bits >> (by & 31) : bits << (-by & 31));
        }
        return v;
    }
    template <int bits>
    static BITMILL_INLINE Ints masked(Ints v) {
        for (auto& word : v.v) word &= (1 << bits) - 1;
        return v;
    }
    static BITMILL_INLINE Ints either(Ints x, const Ints& y) {
        for (int i = 0; i < 16; ++i) x.v[i] |= y.v[i];
        return x;
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
