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
    struct Ints { int32_t v[16]; };
    struct Floats { float v[16]; };
    struct Shorts { int16_t v[64]; };
    static constexpr int batch = 1, bias = 0;

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

    static BITMILL_INLINE Bytes differ(Bytes x, const Bytes& y) {
        for (int i = 0; i < 64; ++i) x.v[i] ^= y.v[i];
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

    template <int R>
    static BITMILL_INLINE Bytes spread(const int8_t* x) {  // one block's columns to all of its R rows
        Bytes out;
        for (int i = 0; i < 64; ++i) out.v[i] = static_cast<uint8_t>(x[i % (64 / R)]);
        return out;
    }
    static BITMILL_INLINE Ints no_ints() { return {}; }
    static BITMILL_INLINE Ints dot(Ints sum, const Bytes& u, const Bytes& x) {
        for (int i = 0; i < 64; ++i) sum.v[i / 4] += u.v[i] * static_cast<int8_t>(x.v[i]);
        return sum;
    }

    static BITMILL_INLINE Ints dot_small(Ints sum, const Bytes& u, const Bytes& x, const Bytes& v, const Bytes& y) {
        return dot(dot(sum, u, x), v, y);  // of two blocks with entries up to 63
    }

    static constexpr int fixed_tokens = 4;
    struct Pairs {  // of signed 16 bits, sixteen rows
        struct Part { int32_t v[16]; };
        static constexpr int rows = 16, words = 1;  // words of four bytes of a row that `dot` takes
        static constexpr bool biased = false;       // entries are stored less `bias`
        static BITMILL_INLINE Part none() { return {}; }
        static BITMILL_INLINE Part load(const uint8_t* p) {
            Part out;
            std::memcpy(out.v, p, 64);
            return out;
        }
        static BITMILL_INLINE Part spread(const uint8_t* x) {
            Part out;
            for (auto& both : out.v) std::memcpy(&both, x, 4);
            return out;
        }
        static BITMILL_INLINE Part dot(Part sum, const Part* w, const Part* x) {
            int16_t a[32], b[32];
            std::memcpy(a, w->v, 64), std::memcpy(b, x->v, 64);
            for (int i = 0; i < 16; ++i) sum.v[i] += a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
            return sum;
        }
        using Reals = Floats;
        static BITMILL_INLINE Reals reals(const float* p) {
            Reals out;
            std::memcpy(out.v, p, 64);
            return out;
        }
        static BITMILL_INLINE void store(float* p, const Reals& v) { std::memcpy(p, v.v, 64); }
        static BITMILL_INLINE Reals add(Reals total, const Part& sum, const Reals& size, float step) {  // total + size * step * sum
            for (int i = 0; i < 16; ++i) total.v[i] += size.v[i] * step * static_cast<float>(sum.v[i]);
            return total;
        }
        static BITMILL_INLINE Reals subtract(Reals total, const Reals& offset, float sum) {  // total - offset * sum
            for (int i = 0; i < 16; ++i) total.v[i] -= offset.v[i] * sum;
            return total;
        }
    };
    struct Quads : Pairs {  // of unsigned times signed bytes
        static constexpr int largest = 255;
        static BITMILL_INLINE Part dot(Part sum, const Part* w, const Part* x) {
            uint8_t a[64];
            int8_t b[64];
            std::memcpy(a, w->v, 64), std::memcpy(b, x->v, 64);
            for (int i = 0; i < 64; ++i) sum.v[i / 4] += a[i] * b[i];
            return sum;
        }
    };

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
    static BITMILL_INLINE Floats fnma(const Floats& x, const Floats& y, const Floats& z) {
        return each([&](int i) { return z.v[i] - x.v[i] * y.v[i]; });
    }
    static BITMILL_INLINE Floats to_float(const Ints& v) { return each([&](int i) { return static_cast<float>(v.v[i]); }); }
    static BITMILL_INLINE Floats inverse_root(const Floats& v) { return each([&](int i) { return 1 / std::sqrt(v.v[i]); }); }
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

    template <int R>
    static BITMILL_INLINE Floats named(const float* powers, const uint8_t* ids, int shift) {  // powers[id >> shift]
        return each([&](int i) { return powers[ids[i * R / 16] >> shift]; });
    }

    template <int i>
    static BITMILL_INLINE Ints sixteen(const Bytes& v) {  // bytes 16 i to 16 i + 15 as numbers
        Ints out;
        for (int l = 0; l < 16; ++l) out.v[l] = v.v[16 * i + l];
        return out;
    }
    template <int bits>
    static BITMILL_INLINE Floats look(const float* table, const Ints& at) {
        return each([&](int i) { return table[at.v[i]]; });
    }

    template <int bits>
    struct Whole {  // a table for all bytes
        static constexpr int top = bits - 1;  // where the code's last bit is expected
        uint8_t entries[1 << bits];
        BITMILL_INLINE void load(const uint8_t* record) { std::memcpy(entries, record, sizeof entries); }
        BITMILL_INLINE void load_small(const uint8_t* record) { load(record); }
        BITMILL_INLINE Bytes look(Bytes code) const {
            for (auto& b : code.v) b = entries[b & ((1 << bits) - 1)];
            return code;
        }
    };
};

}  // namespace bitmill
