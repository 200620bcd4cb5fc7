// 64 bytes as two vectors of AVX2: lookups of 16 entries, and dot products of signed bytes.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "inline.h"

namespace bitmill {

struct Avx2 {
    struct Bytes { __m256i a, b; };
    using Ints = Bytes;
    struct Floats { __m256 a, b; };
    static constexpr int batch = 1;  // tokens that one pass over the codes serves: there are no registers for more
    // Products of unsigned bytes would overflow 16 bits in pairs, so entries are taken less 128: signed.
    static constexpr int bias = 128;

    static BITMILL_INLINE __m256i half(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
    static BITMILL_INLINE __m256i same(int v) { return _mm256_set1_epi8(static_cast<char>(v)); }
    static BITMILL_INLINE Bytes load(const uint8_t* p) { return {half(p), half(p + 32)}; }

    template <int by>
    static BITMILL_INLINE Bytes shifted(Bytes v) {  // right, left where negative; bits cross bytes: dirt
        if constexpr (by > 0) return {_mm256_srli_epi16(v.a, by), _mm256_srli_epi16(v.b, by)};
        else if constexpr (by < 0) return {_mm256_slli_epi16(v.a, -by), _mm256_slli_epi16(v.b, -by)};
        else return v;
    }

    template <int mask>
    static BITMILL_INLINE Bytes select(Bytes x, Bytes y) {  // bits of x where the mask has them, else of y
        const __m256i m = same(mask);
        return {_mm256_or_si256(_mm256_and_si256(x.a, m), _mm256_andnot_si256(m, y.a)),
                _mm256_or_si256(_mm256_and_si256(x.b, m), _mm256_andnot_si256(m, y.b))};
    }

    static BITMILL_INLINE Bytes differ(Bytes x, Bytes y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }

    template <int R>
    static BITMILL_INLINE Bytes spread(const int8_t* x) {  // one block's columns to all of its R rows
        if constexpr (R == 16) {
            int32_t four;
            std::memcpy(&four, x, 4);
            return {_mm256_set1_epi32(four), _mm256_set1_epi32(four)};
        } else if constexpr (R == 4) {
            const __m256i v = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
            return {v, v};
        } else {
            return {half(x), half(x + 32)};
        }
    }

    static BITMILL_INLINE Ints no_ints() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }

    static BITMILL_INLINE __m256i dot(__m256i sum, __m256i u, __m256i x) {
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(u), _mm256_sign_epi8(x, u));
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    static BITMILL_INLINE Ints dot(Ints sum, Bytes u, Bytes x) { return {dot(sum.a, u.a, x.a), dot(sum.b, u.b, x.b)}; }

    // Of two blocks, with entries of at most 63: they need no sign, and both blocks' pairs add up in 16 bits.
    static BITMILL_INLINE __m256i dot_small(__m256i sum, __m256i u, __m256i x, __m256i v, __m256i y) {
        const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(u, x), _mm256_maddubs_epi16(v, y));
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    static BITMILL_INLINE Ints dot_small(Ints sum, Bytes u, Bytes x, Bytes v, Bytes y) {
        return {dot_small(sum.a, u.a, x.a, v.a, y.a), dot_small(sum.b, u.b, x.b, v.b, y.b)};
    }

    static constexpr int fixed_tokens = 4;
    template <int less>
    static BITMILL_INLINE void store_bytes(uint8_t* to, Bytes v) {  // that were less `less`
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_xor_si256(v.a, same(less)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32), _mm256_xor_si256(v.b, same(less)));
    }
    // Entries less `less` of 16 rows and 4 columns as 16 bits each: two columns of all rows, then the other two.
    template <int less>
    static BITMILL_INLINE void store_pairs(uint8_t* to, Bytes v) {
        const __m128i two = _mm_setr_epi8(0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1);  // -1: zero
        const __m256i first = _mm256_broadcastsi128_si256(two), second = _mm256_add_epi8(first, _mm256_set1_epi16(2));
        const auto put = [&](uint8_t* at, __m256i half) {
            const __m256i u = _mm256_xor_si256(half, same(less));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm256_shuffle_epi8(u, first));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + 64), _mm256_shuffle_epi8(u, second));
        };
        put(to, v.a), put(to + 32, v.b);
    }
    struct Pairs {  // of signed 16 bits, eight rows: compilers keep structures of two registers in memory
        using Part = __m256i;
        static constexpr int rows = 8, words = 1;  // words of four bytes of a row that `dot` takes
        static constexpr bool biased = false;      // entries are stored less `bias`
        static BITMILL_INLINE Part none() { return _mm256_setzero_si256(); }
        static BITMILL_INLINE Part load(const uint8_t* p) { return half(p); }
        static BITMILL_INLINE Part spread(const uint8_t* x) { return Avx2::spread<16>(reinterpret_cast<const int8_t*>(x)).a; }
        static BITMILL_INLINE Part dot(Part sum, const Part* w, const Part* x) { return _mm256_add_epi32(sum, _mm256_madd_epi16(*w, *x)); }
        using Reals = __m256;
        static BITMILL_INLINE Reals reals(const float* p) { return _mm256_loadu_ps(p); }
        static BITMILL_INLINE void store(float* p, Reals v) { _mm256_storeu_ps(p, v); }
        static BITMILL_INLINE Reals add(Reals total, Part sum, Reals size, float step) {  // total + size * step * sum
            return _mm256_fmadd_ps(_mm256_mul_ps(size, _mm256_set1_ps(step)), _mm256_cvtepi32_ps(sum), total);
        }
        static BITMILL_INLINE Reals subtract(Reals total, Reals offset, float sum) {  // total - offset * sum
            return _mm256_fnmadd_ps(offset, _mm256_set1_ps(sum), total);
        }
    };
    struct Quads : Pairs {  // of unsigned times signed bytes: 4 * 63 * 128 fits 16 bits; larger entries are no faster than Pairs
        static constexpr int words = 2, largest = 63;
        static BITMILL_INLINE Part dot(Part sum, const Part* w, const Part* x) { return dot_small(sum, w[0], x[0], w[1], x[1]); }
    };

    // 64 sums of 16 bits, of which every table gives the low and the high bytes separately.
    struct Shorts { __m256i v[4]; };
    static BITMILL_INLINE Shorts no_shorts() {
        const __m256i none = _mm256_setzero_si256();
        return {{none, none, none, none}};
    }
    static BITMILL_INLINE Shorts add(Shorts sum, Bytes low, Bytes high) {
        return {{_mm256_add_epi16(sum.v[0], _mm256_unpacklo_epi8(low.a, high.a)),
                 _mm256_add_epi16(sum.v[1], _mm256_unpackhi_epi8(low.a, high.a)),
                 _mm256_add_epi16(sum.v[2], _mm256_unpacklo_epi8(low.b, high.b)),
                 _mm256_add_epi16(sum.v[3], _mm256_unpackhi_epi8(low.b, high.b))}};
    }
    static BITMILL_INLINE void to_floats(Shorts s, Floats (&out)[4]) {  // halves were taken in turns: undone
        const auto wide = [](__m256i both) {
            return to_float({_mm256_cvtepi16_epi32(_mm256_castsi256_si128(both)),
                             _mm256_cvtepi16_epi32(_mm256_extracti128_si256(both, 1))});
        };
        for (int i = 0; i < 2; ++i) {
            out[2 * i] = wide(_mm256_permute2x128_si256(s.v[2 * i], s.v[2 * i + 1], 0x20));
            out[2 * i + 1] = wide(_mm256_permute2x128_si256(s.v[2 * i], s.v[2 * i + 1], 0x31));
        }
    }

    static BITMILL_INLINE Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static BITMILL_INLINE Floats all(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
    static BITMILL_INLINE Floats to_float(Ints v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
    static BITMILL_INLINE Floats fma(Floats x, Floats y, Floats z) {
        return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
    }
    static BITMILL_INLINE Floats fnma(Floats x, Floats y, Floats z) {
        return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)};
    }
    static BITMILL_INLINE Floats add(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
    static BITMILL_INLINE Floats sub(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
    static BITMILL_INLINE Floats mul(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
    static BITMILL_INLINE Floats inverse_root(Floats v) {  // 1 / sqrt(v), nearly to the last bit
        const Floats r = {_mm256_rsqrt_ps(v.a), _mm256_rsqrt_ps(v.b)};
        return mul(r, fnma(mul(v, all(0.5f)), mul(r, r), all(1.5f)));
    }
    static BITMILL_INLINE void store(float* p, Floats v) { _mm256_storeu_ps(p, v.a), _mm256_storeu_ps(p + 8, v.b); }
    static BITMILL_INLINE float sum(Floats v) {
        const __m256 both = _mm256_add_ps(v.a, v.b);
        __m128 four = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
        four = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
    }
    static BITMILL_INLINE Floats of_bf16(const uint16_t* p) {
        const auto eight = [](const uint16_t* at) {
            const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
            return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
        };
        return {eight(p), eight(p + 8)};
    }

    // Numbers of R rows, each in all lanes of its row.
    template <int R>
    static BITMILL_INLINE Floats rows(const uint16_t* halves) {
        const auto eight = [](const uint16_t* p) {
            return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        };
        if constexpr (R == 16) {
            return {eight(halves), eight(halves + 8)};
        } else if constexpr (R == 4) {
            int64_t four;
            std::memcpy(&four, halves, 8);
            return fours(_mm_cvtph_ps(_mm_cvtsi64_si128(four)));
        } else {
            return all(_cvtsh_ss(*halves));
        }
    }

    template <int R>
    static BITMILL_INLINE Floats rows(const uint8_t* bytes) { return to_float(row_ints<R>(bytes)); }

    template <int R>
    static BITMILL_INLINE Ints row_ints(const uint8_t* bytes) {
        __m128i v = _mm_set1_epi8(static_cast<char>(*bytes));
        if constexpr (R == 16) {
            v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
        } else if constexpr (R == 4) {
            int32_t four;
            std::memcpy(&four, bytes, 4);
            v = _mm_shuffle_epi8(_mm_set1_epi32(four), _mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3));
        }
        return {_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8))};
    }

    template <int R>
    static BITMILL_INLINE Floats rows(const float* p) {
        if constexpr (R == 16) return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
        else if constexpr (R == 4) return fours(_mm_loadu_ps(p));
        else return all(*p);
    }

    static BITMILL_INLINE Floats fours(__m128 v) {  // four numbers, four times each
        const __m256 both = _mm256_castps128_ps256(v);
        return {_mm256_permutevar8x32_ps(both, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1)),
                _mm256_permutevar8x32_ps(both, _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3))};
    }

    // Of 16 numbers in two vectors those that bits 0 to 3 of `at` name.
    static BITMILL_INLINE __m256 pick(__m256 low, __m256 high, __m256i at) {
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, at), _mm256_permutevar8x32_ps(high, at),
                                _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)));
    }
    template <int R>
    static BITMILL_INLINE Floats named(const float* powers, const uint8_t* ids, int shift) {  // powers[id >> shift]
        Ints id = row_ints<R>(ids);
        id = {_mm256_srli_epi32(id.a, shift), _mm256_srli_epi32(id.b, shift)};
        const __m256 low = _mm256_loadu_ps(powers);
        if (shift >= 5) return {_mm256_permutevar8x32_ps(low, id.a), _mm256_permutevar8x32_ps(low, id.b)};
        const __m256 high = _mm256_loadu_ps(powers + 8);
        return {pick(low, high, id.a), pick(low, high, id.b)};
    }

    // Bytes 16 i to 16 i + 15 as numbers, and numbers from tables of floats.
    template <int i>
    static BITMILL_INLINE Ints sixteen(Bytes v) {
        const __m128i part = _mm256_extracti128_si256(i < 2 ? v.a : v.b, i % 2);
        return {_mm256_cvtepu8_epi32(part), _mm256_cvtepu8_epi32(_mm_srli_si128(part, 8))};
    }
    template <int bits>
    static BITMILL_INLINE Ints masked(Ints v) {
        const __m256i mask = _mm256_set1_epi32((1 << bits) - 1);
        return {_mm256_and_si256(v.a, mask), _mm256_and_si256(v.b, mask)};
    }
    template <int bits>
    static BITMILL_INLINE Ints of_rows(Ints v) {  // four rows' tables of 2^bits follow each other
        const __m256i rows = _mm256_setr_epi32(0, 0, 0, 0, 1 << bits, 1 << bits, 1 << bits, 1 << bits);
        return {_mm256_or_si256(v.a, rows), _mm256_or_si256(v.b, _mm256_add_epi32(rows, _mm256_set1_epi32(2 << bits)))};
    }
    template <int bits>
    static BITMILL_INLINE Floats look(const float* table, Ints at) {  // tables are at least 16 numbers
        if constexpr (bits <= 5) return {piece<bits>(table, at.a), piece<bits>(table, at.b)};
        else return {_mm256_i32gather_ps(table, at.a, 4), _mm256_i32gather_ps(table, at.b, 4)};
    }
    template <int bits>  // of eight entries, or of two halves that the last bit chooses from
    static BITMILL_INLINE __m256 piece(const float* table, __m256i at) {
        if constexpr (bits <= 3) {
            return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), at);
        } else {
            const __m256 chosen = _mm256_castsi256_ps(_mm256_slli_epi32(at, 32 - bits));
            return _mm256_blendv_ps(piece<bits - 1>(table, at), piece<bits - 1>(table + (1 << (bits - 1)), at), chosen);
        }
    }
    static BITMILL_INLINE Floats fours_of(const float* p) {  // p[0] to p[3], four times
        const __m256 v = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
        return {v, v};
    }

    // Tables of bytes: avx2_tables.h.
    static constexpr bool split_third_bit = true;  // Lanes<3>: the third bits of codes come in a vector of their own
    static BITMILL_INLINE __m256i four_rows() {  // of 16 bytes, four each
        const __m128i rows = _mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        return _mm256_broadcastsi128_si256(rows);
    }
    static BITMILL_INLINE __m128i masked_ids(const uint8_t* ids, int mask) {
        return _mm_and_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(ids)), _mm_set1_epi8(static_cast<char>(mask)));
    }
    template <int bits>
    struct Whole;
    struct Words;
    template <int bits>
    struct Lanes;
    struct Sums;
};

}  // namespace bitmill

#include "avx2_tables.h"
