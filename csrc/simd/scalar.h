// The vectors of the other headers as plain arrays, for any machine. Compilers turn the loops into what it has.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "inline.h"

namespace bitmill {

inline float from_half(uint16_t h) {
    const int exponent = h >> 10 & 31, mantissa = h & 1023;
    const float sign = h & 0x8000 ? -1.0f : 1.0f;
    if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
    return sign * (exponent ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp(1.0f * mantissa, -24));
}

struct Scalar {
    struct Bytes { uint8_t v[64]; };
    struct Floats { float v[16]; };
    struct Shorts { int16_t v[64]; };
    static constexpr int bias = 0;

    static BITMILL_INLINE Bytes load(const uint8_t* p) {
        Bytes out;
        std::memcpy(out.v, p, 64);
        return out;
    }

    template <int by>
    static BITMILL_INLINE Bytes shifted(Bytes v) {  // right, left where negative
        for (auto& b : v.v) b = static_cast<uint8_t>(by > 0 ? b >> by : b << -by);
        return v;
    }

    template <int mask>
    static BITMILL_INLINE Bytes select(Bytes x, const Bytes& y) {  // bits of x where the mask has them, else of y
        for (int i = 0; i < 64; ++i) x.v[i] = static_cast<uint8_t>((x.v[i] & mask) | (y.v[i] & ~mask));
        return x;
    }

    static BITMILL_INLINE Shorts no_shorts() { return {}; }
    static BITMILL_INLINE Shorts add(Shorts sum, const Bytes& low, const Bytes& high) {
        for (int i = 0; i < 64; ++i) sum.v[i] = static_cast<int16_t>(sum.v[i] + (low.v[i] | high.v[i] << 8));
        return sum;
    }
    static BITMILL_INLINE void to_floats(const Shorts& s, Floats (&out)[4]) {
        for (int i = 0; i < 64; ++i) out[i / 16].v[i % 16] = s.v[i];
    }

    template <class Each>
    static BITMILL_INLINE Floats each(const Each& value) {
        Floats out;
        for (int i = 0; i < 16; ++i) out.v[i] = value(i);
        return out;
    }
    static BITMILL_INLINE Floats zero() { return {}; }
    static BITMILL_INLINE Floats all(float v) { return each([&](int) { return v; }); }
    static BITMILL_INLINE Floats add(const Floats& x, const Floats& y) { return each([&](int i) { return x.v[i] + y.v[i]; }); }
    static BITMILL_INLINE Floats sub(const Floats& x, const Floats& y) { return each([&](int i) { return x.v[i] - y.v[i]; }); }
    static BITMILL_INLINE Floats mul(const Floats& x, const Floats& y) { return each([&](int i) { return x.v[i] * y.v[i]; }); }
    static BITMILL_INLINE Floats fma(const Floats& x, const Floats& y, const Floats& z) {
        return each([&](int i) { return x.v[i] * y.v[i] + z.v[i]; });
    }
    static BITMILL_INLINE void store(float* p, const Floats& v) { std::memcpy(p, v.v, 64); }
    static BITMILL_INLINE float sum(Floats v) {
        for (int width = 8; width; width /= 2)
            for (int i = 0; i < width; ++i) v.v[i] += v.v[i + width];
        return v.v[0];
    }
    static BITMILL_INLINE Floats of_bf16(const uint16_t* p) {
        return each([&](int i) {
            const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
            float value;
            std::memcpy(&value, &bits, 4);
            return value;
        });
    }

    template <int R>
    static BITMILL_INLINE Floats rows(const float* p) { return each([&](int i) { return p[i * R / 16]; }); }
    template <int R>
    static BITMILL_INLINE Floats rows(const uint16_t* halves) {
        return each([&](int i) { return from_half(halves[i * R / 16]); });
    }

    template <int bits>
    struct Whole {  // a table for all bytes
        const uint8_t* record;
        BITMILL_INLINE void load(const uint8_t* from) { record = from; }
        BITMILL_INLINE Bytes look(Bytes code) const {
            for (auto& b : code.v) b = record[b & ((1 << bits) - 1)];
            return code;
        }
    };
};

}  // namespace bitmill
