// Streams of 32-bit words, a lane each, with AVX-512.
#pragma once
#include "avx512.h"

namespace bitmill {

struct Avx512Streams : Avx512 {
    static constexpr int floats = 32;  // that fit into the registers
    static constexpr bool unrolls = true;
    static BITMILL_INLINE Ints words(const uint32_t* p) { return _mm512_loadu_si512(p); }
    template <int by>
    static BITMILL_INLINE Ints moved(Ints v) {  // right, left where negative
        if constexpr (by >= 0) return _mm512_srli_epi32(v, by);
        else return _mm512_slli_epi32(v, -by);
    }
    static BITMILL_INLINE Ints either(Ints a, Ints b) { return _mm512_or_si512(a, b); }
    static BITMILL_INLINE Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
    static BITMILL_INLINE float largest(Floats v) { return _mm512_reduce_max_ps(v); }

    // 2^n, of 1.5 * 2^23 + 127 + n.
    static BITMILL_INLINE Floats power(Floats v) { return _mm512_castsi512_ps(moved<-23>(_mm512_castps_si512(v))); }

    // Up to 16 numbers, repeated to 16, in a register: dirt above the code does no harm.
    template <int bits>
    struct Numbers {
        Floats entries;
        BITMILL_INLINE explicit Numbers(const float* sixteen) : entries(_mm512_loadu_ps(sixteen)) {}
        BITMILL_INLINE Floats look(Ints code) const { return _mm512_permutexvar_ps(code, entries); }
    };
};

}  // namespace bitmill
