// Pairs of 16 bits and quads of bytes in NEON, for products of many tokens. Included by neon.h.
#pragma once
#include "neon.h"

namespace bitmill {

// Of signed 16 bits, four rows.
struct Neon::Pairs {
    using Part = int32x4_t;
    static constexpr int rows = 4, words = 1;  // words of four bytes of a row that `dot` takes
    static constexpr bool biased = false;      // entries are stored less `bias`
    static BITMILL_INLINE Part none() { return vdupq_n_s32(0); }
    static BITMILL_INLINE Part load(const uint8_t* p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }
    static BITMILL_INLINE Part spread(const uint8_t* x) {
        int32_t both;
        std::memcpy(&both, x, 4);
        return vdupq_n_s32(both);
    }
    static BITMILL_INLINE Part dot(Part sum, const Part* w, const Part* x) {
        const int16x8_t a = vreinterpretq_s16_s32(*w), b = vreinterpretq_s16_s32(*x);
        return vaddq_s32(sum, vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b)));
    }
    using Reals = float32x4_t;
    static BITMILL_INLINE Reals reals(const float* p) { return vld1q_f32(p); }
    static BITMILL_INLINE void store(float* p, Reals v) { vst1q_f32(p, v); }
    static BITMILL_INLINE Reals add(Reals total, Part sum, Reals size, float step) {  // total + size * step * sum
        return vfmaq_f32(total, vmulq_n_f32(size, step), vcvtq_f32_s32(sum));
    }
    static BITMILL_INLINE Reals subtract(Reals total, Reals offset, float sum) {  // total - offset * sum
        return vfmsq_f32(total, offset, vdupq_n_f32(sum));
    }
};

// Of signed bytes.
struct Neon::Quads : Neon::Pairs {
    static constexpr int largest = 255;
    static constexpr bool biased = true;
    static BITMILL_INLINE Part all(int32_t v) { return vdupq_n_s32(v); }
    static BITMILL_INLINE Part dot(Part sum, const Part* w, const Part* x) {
        return Neon::dot(sum, vreinterpretq_u8_s32(*w), vreinterpretq_u8_s32(*x));
    }
};

}  // namespace bitmill
