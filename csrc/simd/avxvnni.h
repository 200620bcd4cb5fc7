// Products of many tokens with AVX-VNNI: AVX2, and one instruction that multiplies and adds bytes of 256 bits.
#pragma once
#include "avx2_streams.h"

namespace bitmill {

struct AvxVnni : Avx2Streams {
    static constexpr int fixed_tokens = 6;  // 12 sums of eight rows, entries of both and a word of a token: 15 of 16 registers
#if defined(__AVXVNNI__)
    static BITMILL_INLINE __m256i bytes(__m256i sum, __m256i w, __m256i x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
    static BITMILL_INLINE __m256i words16(__m256i sum, __m256i w, __m256i x) { return _mm256_dpwssd_avx_epi32(sum, w, x); }
#else  // AVX-512 with vectors of 256 bits has them in another encoding: to test where AVX-VNNI is missing
    static BITMILL_INLINE __m256i bytes(__m256i sum, __m256i w, __m256i x) { return _mm256_dpbusd_epi32(sum, w, x); }
    static BITMILL_INLINE __m256i words16(__m256i sum, __m256i w, __m256i x) { return _mm256_dpwssd_epi32(sum, w, x); }
#endif
    struct Pairs : Avx2::Pairs {
        static BITMILL_INLINE Part dot(Part sum, const Part* w, const Part* x) { return words16(sum, *w, *x); }
    };
    struct Quads : Pairs {  // of unsigned times signed bytes
        static constexpr int largest = 255;
        static BITMILL_INLINE Part dot(Part sum, const Part* w, const Part* x) { return bytes(sum, *w, *x); }
    };
};

}  // namespace bitmill
