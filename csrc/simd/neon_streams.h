// Streams of 32-bit words, a lane each, with NEON.
#pragma once
#include "neon.h"

namespace bitmill {

struct NeonStreams : Neon {
    static constexpr int floats = 8;  // that fit into the registers
    static constexpr bool unrolls = true;
    static BITMILL_INLINE Ints words(const uint32_t* p) {
        return each<Ints>([&](int i) { return vreinterpretq_s32_u32(vld1q_u32(p + 4 * i)); });
    }
    template <int by>
    static BITMILL_INLINE Ints moved(Ints v) {  // right, left where negative
        return each<Ints>([&](int i) {
            const uint32x4_t word = vreinterpretq_u32_s32(v.v[i]);
            if constexpr (by == 0) return v.v[i];
            else if constexpr (by > 0) return vreinterpretq_s32_u32(vshrq_n_u32(word, by));
            else return vreinterpretq_s32_u32(vshlq_n_u32(word, -by));
        });
    }
    static BITMILL_INLINE Ints either(Ints x, Ints y) {
        return each<Ints>([&](int i) { return vorrq_s32(x.v[i], y.v[i]); });
    }
    static BITMILL_INLINE Floats larger(Floats x, Floats y) {
        return each<Floats>([&](int i) { return vmaxq_f32(x.v[i], y.v[i]); });
    }
    static BITMILL_INLINE float largest(Floats v) {
        return vmaxvq_f32(vmaxq_f32(vmaxq_f32(v.v[0], v.v[1]), vmaxq_f32(v.v[2], v.v[3])));
    }

    // 2^n, of 1.5 * 2^23 + 127 + n.
    static BITMILL_INLINE Floats power(Floats v) {
        return each<Floats>([&](int i) { return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(v.v[i]), 23)); });
    }

    // Up to 16 numbers, repeated to 16, in registers: dirt above the code does no harm.
    template <int bits>
    struct Numbers {
        uint8x16x4_t entries;
        BITMILL_INLINE explicit Numbers(const float* sixteen) {
            for (int i = 0; i < 4; ++i) entries.val[i] = vreinterpretq_u8_f32(vld1q_f32(sixteen + 4 * i));
        }
        BITMILL_INLINE Floats look(Ints code) const {
            const uint32x4_t first = vdupq_n_u32(0x03020100);  // a number's bytes are four times its place, and on
            return each<Floats>([&](int i) {
                const uint32x4_t at = vandq_u32(vreinterpretq_u32_s32(code.v[i]), vdupq_n_u32((1 << bits) - 1));
                return vreinterpretq_f32_u8(vqtbl4q_u8(entries, vreinterpretq_u8_u32(vmlaq_n_u32(first, at, 0x04040404))));
            });
        }
    };
};

}  // namespace bitmill
