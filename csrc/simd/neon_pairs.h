// Pairs of 16 bits in NEON, for products of many tokens. Included by neon.h.
#pragma once
#include "neon.h"

namespace bitmill {

// Of signed 16 bits, four rows.
struct Neon::Pairs {
    using Part = int32x4_t;
    static constexpr int rows = 4;
    static BITMILL_INLINE Part none() { return vdupq_n_s32(0); }
    static BITMILL_INLINE Part load(const uint8_t* p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }
    static BITMILL_INLINE Part spread(const int8_t* x) {
        int32_t both;
        std::memcpy(&both, x, 4);
        return vdupq_n_s32(both);
    }
    static BITMILL_INLINE Part dot(Part sum, Part w, Part x) {
        const int16x8_t a = vreinterpretq_s16_s32(w), b = vreinterpretq_s16_s32(x);
        return vaddq_s32(sum, vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b)));
    }
    static BITMILL_INLINE void add(float* total, Part sum, const float* size, float step) {  // total += size * step * sum
        const float32x4_t both = vmulq_n_f32(vld1q_f32(size), step);
        vst1q_f32(total, vfmaq_f32(vld1q_f32(total), both, vcvtq_f32_s32(sum)));
    }
};

}  // namespace bitmill
