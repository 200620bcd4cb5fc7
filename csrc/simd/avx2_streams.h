// Streams of 32-bit words, a lane each, with AVX2.
#pragma once
#include "avx2.h"

namespace bitmill {

struct Avx2Streams : Avx2 {
    static constexpr int floats = 8;  // that fit into the registers
    static constexpr bool unrolls = true;
    static BITMILL_INLINE Ints words(const uint32_t* p) { return {half(p), half(p + 8)}; }
    template <int by>
    static BITMILL_INLINE Ints moved(Ints v) {  // right, left where negative
        if constexpr (by >= 0) return {_mm256_srli_epi32(v.a, by), _mm256_srli_epi32(v.b, by)};
        else return {_mm256_slli_epi32(v.a, -by), _mm256_slli_epi32(v.b, -by)};
    }
    static BITMILL_INLINE Ints either(Ints x, Ints y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
    static BITMILL_INLINE Floats larger(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
    static BITMILL_INLINE float largest(Floats v) {
        const __m256 both = _mm256_max_ps(v.a, v.b);
        __m128 four = _mm_max_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
        four = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
    }

    // 2^n, of 1.5 * 2^23 + 127 + n.
    static BITMILL_INLINE Floats power(Floats v) {
        const Ints bits = moved<-23>(Ints{_mm256_castps_si256(v.a), _mm256_castps_si256(v.b)});
        return {_mm256_castsi256_ps(bits.a), _mm256_castsi256_ps(bits.b)};
    }

    // Up to 16 numbers, repeated to 16, in registers: dirt above the code does no harm.
    template <int bits>
    struct Numbers {
        __m256 low, high;
        BITMILL_INLINE explicit Numbers(const float* sixteen) : low(_mm256_loadu_ps(sixteen)), high(_mm256_loadu_ps(sixteen + 8)) {}
        BITMILL_INLINE __m256 look(__m256i code) const {
            const __m256 found = _mm256_permutevar8x32_ps(low, code);
            if constexpr (bits <= 3) return found;
            return _mm256_blendv_ps(found, _mm256_permutevar8x32_ps(high, code), _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
        }
        BITMILL_INLINE Floats look(Ints code) const { return {look(code.a), look(code.b)}; }
    };
};

}  // namespace bitmill
