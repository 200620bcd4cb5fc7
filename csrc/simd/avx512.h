// 64 bytes at a time with AVX-512: VBMI looks up 64 entries at once, VNNI multiplies and adds bytes.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "inline.h"

namespace bitmill {

struct Avx512 {
    using Bytes = __m512i;
    using Ints = __m512i;
    using Floats = __m512;
    static constexpr int batch = 4;  // tokens that one pass over the codes serves
    static constexpr int bias = 0;  // of table entries in `dot`: they are taken as unsigned

    static BITMILL_INLINE Bytes load(const void* p) { return _mm512_loadu_si512(p); }

    template <int by>
    static BITMILL_INLINE Bytes shifted(Bytes v) {  // right, left where negative; bits cross bytes: dirt
        if constexpr (by > 0) return _mm512_srli_epi16(v, by);
        else if constexpr (by < 0) return _mm512_slli_epi16(v, -by);
        else return v;
    }

    template <int mask>
    static BITMILL_INLINE Bytes select(Bytes a, Bytes b) {  // bits of a where the mask has them, else of b
        return _mm512_ternarylogic_epi32(_mm512_set1_epi8(mask), a, b, 0xCA);
    }

    static BITMILL_INLINE Bytes differ(Bytes a, Bytes b) { return _mm512_xor_si512(a, b); }

    template <int R>
    static BITMILL_INLINE Bytes spread(const int8_t* x) {  // one block's columns to all of its R rows
        if constexpr (R == 16) {
            int32_t four;
            std::memcpy(&four, x, 4);
            return _mm512_set1_epi32(four);
        } else if constexpr (R == 4) {
            return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
        } else {
            return _mm512_loadu_si512(x);
        }
    }

    static BITMILL_INLINE Ints no_ints() { return _mm512_setzero_si512(); }
    static BITMILL_INLINE Ints dot(Ints sum, Bytes u, Bytes x) { return _mm512_dpbusd_epi32(sum, u, x); }
    static BITMILL_INLINE Ints dot_small(Ints sum, Bytes u, Bytes x, Bytes v, Bytes y) {  // two blocks', entries up to 63
        return dot(dot(sum, u, x), v, y);
    }

    template <int>
    static BITMILL_INLINE void store_bytes(uint8_t* to, Bytes v) { _mm512_storeu_si512(to, v); }
    template <int>
    static BITMILL_INLINE void store_pairs(uint8_t* to, Bytes v) {  // as 16 bits: two columns of all rows, then the other two
        const __m128i two = _mm_setr_epi8(0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1);  // -1: zero
        const __m512i first = _mm512_broadcast_i32x4(two), second = _mm512_add_epi8(first, _mm512_set1_epi16(2));
        _mm512_storeu_si512(to, _mm512_shuffle_epi8(v, first));
        _mm512_storeu_si512(to + 64, _mm512_shuffle_epi8(v, second));
    }
    static constexpr int fixed_tokens = 14;  // as many integer and float sums fit into the registers
    struct Pairs {  // of signed 16 bits, sixteen rows
        using Part = __m512i;
        static constexpr int rows = 16, words = 1;  // words of four bytes of a row that `dot` takes
        static constexpr bool biased = false;       // entries are stored less `bias`
        static BITMILL_INLINE Part none() { return _mm512_setzero_si512(); }
        static BITMILL_INLINE Part load(const uint8_t* p) { return Avx512::load(p); }
        static BITMILL_INLINE Part spread(const uint8_t* x) { return Avx512::spread<16>(reinterpret_cast<const int8_t*>(x)); }
        static BITMILL_INLINE Part dot(Part sum, const Part* w, const Part* x) { return _mm512_dpwssd_epi32(sum, *w, *x); }
        using Reals = __m512;
        static BITMILL_INLINE Reals reals(const float* p) { return _mm512_loadu_ps(p); }
        static BITMILL_INLINE void store(float* p, Reals v) { _mm512_storeu_ps(p, v); }
        static BITMILL_INLINE Reals add(Reals total, Part sum, Reals size, float step) {  // total + size * step * sum
            return _mm512_fmadd_ps(_mm512_mul_ps(size, _mm512_set1_ps(step)), _mm512_cvtepi32_ps(sum), total);
        }
        static BITMILL_INLINE Reals subtract(Reals total, Reals offset, float sum) {  // total - offset * sum
            return _mm512_fnmadd_ps(offset, _mm512_set1_ps(sum), total);
        }
    };
    struct Quads : Pairs {  // of unsigned times signed bytes
        static constexpr int largest = 255;
        static BITMILL_INLINE Part dot(Part sum, const Part* w, const Part* x) { return _mm512_dpbusd_epi32(sum, *w, *x); }
    };

    // 64 sums of 16 bits, of which every table gives the low and the high bytes separately.
    struct Shorts { __m512i low, high; };
    static BITMILL_INLINE Shorts no_shorts() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
    static BITMILL_INLINE Shorts add(Shorts sum, Bytes low, Bytes high) {
        return {_mm512_add_epi16(sum.low, _mm512_unpacklo_epi8(low, high)),
                _mm512_add_epi16(sum.high, _mm512_unpackhi_epi8(low, high))};
    }
    static BITMILL_INLINE void to_floats(Shorts s, Floats (&out)[4]) {  // quarters of 8 were taken in turns: undone
        const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
        const __m512i last = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
        const auto halves = [&](__m512i both, Floats* to) {
            to[0] = to_float(_mm512_cvtepi16_epi32(_mm512_castsi512_si256(both)));
            to[1] = to_float(_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(both, 1)));
        };
        halves(_mm512_permutex2var_epi64(s.low, first, s.high), out);
        halves(_mm512_permutex2var_epi64(s.low, last, s.high), out + 2);
    }

    static BITMILL_INLINE Floats zero() { return _mm512_setzero_ps(); }
    static BITMILL_INLINE Floats all(float v) { return _mm512_set1_ps(v); }
    static BITMILL_INLINE Floats to_float(Ints v) { return _mm512_cvtepi32_ps(v); }
    static BITMILL_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static BITMILL_INLINE Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
    static BITMILL_INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static BITMILL_INLINE Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
    static BITMILL_INLINE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static BITMILL_INLINE Floats inverse_root(Floats v) {  // 1 / sqrt(v), nearly to the last bit
        const Floats r = _mm512_rsqrt14_ps(v);
        return mul(r, fnma(mul(v, all(0.5f)), mul(r, r), all(1.5f)));
    }
    static BITMILL_INLINE void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
    static BITMILL_INLINE float sum(Floats v) { return _mm512_reduce_add_ps(v); }
    static BITMILL_INLINE Floats of_bf16(const uint16_t* p) {
        const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }

    // Numbers of R rows, each in all lanes of its row.
    template <int R>
    static BITMILL_INLINE Floats rows(const uint16_t* halves) {
        if constexpr (R == 16) {
            return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves)));
        } else if constexpr (R == 4) {
            int64_t four;
            std::memcpy(&four, halves, 8);
            const __m256i each = _mm256_setr_epi8(0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 2, 3,  //
                                                  4, 5, 4, 5, 4, 5, 4, 5, 6, 7, 6, 7, 6, 7, 6, 7);
            return _mm512_cvtph_ps(_mm256_shuffle_epi8(_mm256_set1_epi64x(four), each));
        } else {
            return _mm512_set1_ps(_cvtsh_ss(*halves));
        }
    }

    template <int R>
    static BITMILL_INLINE Floats rows(const uint8_t* bytes) { return _mm512_cvtepi32_ps(row_ints<R>(bytes)); }

    template <int R>
    static BITMILL_INLINE Floats rows(const float* p) {
        if constexpr (R == 16) return _mm512_loadu_ps(p);
        else if constexpr (R == 4) return _mm512_permutexvar_ps(each_four(), _mm512_castps128_ps512(_mm_loadu_ps(p)));
        else return _mm512_set1_ps(*p);
    }

    static BITMILL_INLINE Ints each_four() {
        return _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    }

    template <int R>
    static BITMILL_INLINE Floats named(const float* powers, const uint8_t* ids, int shift) {  // powers[id >> shift]
        return _mm512_permutexvar_ps(_mm512_srli_epi32(row_ints<R>(ids), shift), _mm512_loadu_ps(powers));
    }

    template <int R>
    static BITMILL_INLINE Ints row_ints(const uint8_t* bytes) {
        if constexpr (R == 16) {
            return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
        } else if constexpr (R == 4) {
            int32_t four;
            std::memcpy(&four, bytes, 4);
            const __m128i each = _mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
            return _mm512_cvtepu8_epi32(_mm_shuffle_epi8(_mm_set1_epi32(four), each));
        } else {
            return _mm512_set1_epi32(*bytes);
        }
    }

    // Bytes 16 i to 16 i + 15 as numbers, and numbers from tables of floats.
    template <int i>
    static BITMILL_INLINE Ints sixteen(Bytes v) { return _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(v, i)); }
    template <int bits>
    static BITMILL_INLINE Ints masked(Ints v) { return _mm512_and_si512(v, _mm512_set1_epi32((1 << bits) - 1)); }
    template <int bits>
    static BITMILL_INLINE Ints of_rows(Ints v) {  // four rows' tables of 2^bits follow each other
        return _mm512_or_si512(v, _mm512_slli_epi32(each_four(), bits));
    }
    template <int bits>
    static BITMILL_INLINE Floats look(const float* table, Ints at) {  // tables are at least 16 numbers
        if constexpr (bits <= 4) return _mm512_permutexvar_ps(at, _mm512_loadu_ps(table));
        else if constexpr (bits == 5) return _mm512_permutex2var_ps(_mm512_loadu_ps(table), at, _mm512_loadu_ps(table + 16));
        else return _mm512_i32gather_ps(at, table, 4);
    }
    static BITMILL_INLINE Floats fours_of(const float* p) {  // p[0] to p[3], four times
        return _mm512_broadcast_f32x4(_mm_loadu_ps(p));
    }

    // One table for all 64 bytes, repeated to 64 entries where it is shorter: dirt above the code does no harm.
    template <int bits>
    struct Whole {
        static constexpr int top = bits - 1;  // where the code's last bit is expected
        static constexpr int vectors = bits <= 6 ? 1 : bits == 7 ? 2 : 4;
        Bytes entries[vectors];

        BITMILL_INLINE void load(const uint8_t* record) {
            for (int i = 0; i < vectors; ++i) entries[i] = Avx512::load(record + 64 * i);
        }

        BITMILL_INLINE void load_small(const uint8_t* record) { load(record); }  // for dot_small

        BITMILL_INLINE Bytes look(Bytes code) const {
            if constexpr (bits <= 6) {
                return _mm512_permutexvar_epi8(code, entries[0]);
            } else if constexpr (bits == 7) {
                return _mm512_permutex2var_epi8(entries[0], code, entries[1]);
            } else {
                const Bytes lower = _mm512_permutex2var_epi8(entries[0], code, entries[1]);
                const Bytes upper = _mm512_permutex2var_epi8(entries[2], code, entries[3]);
                return _mm512_mask_mov_epi8(lower, _mm512_movepi8_mask(code), upper);
            }
        }
    };

    static constexpr bool split_third_bit = false;  // Lanes<3> takes whole codes
    static BITMILL_INLINE Bytes fours() {  // where the four entries of each of 16 rows start
        return _mm512_set_epi32(0x3c3c3c3c, 0x38383838, 0x34343434, 0x30303030, 0x2c2c2c2c, 0x28282828, 0x24242424,
                                0x20202020, 0x1c1c1c1c, 0x18181818, 0x14141414, 0x10101010, 0x0c0c0c0c, 0x08080808,
                                0x04040404, 0);
    }

    // A table for every row: 16 rows of 4 entries in one vector, of 8 in two, or 4 rows of 16 in one.
    template <int bits>
    struct Lanes {
        static constexpr int top = bits == 3 ? 6 : bits - 1;
        static constexpr int vectors = bits == 3 ? 2 : 1;
        Bytes entries[vectors];

        BITMILL_INLINE void load(const uint8_t* record) {
            for (int i = 0; i < vectors; ++i) entries[i] = Avx512::load(record + 64 * i);
        }

        BITMILL_INLINE void load_mirrored(const uint8_t* record) {  // halves of tables, 8 or 4 bytes a row
            if constexpr (bits == 4) {
                const Bytes both = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(record)));
                const Bytes each = _mm512_set_epi64(0x18191a1b1c1d1e1f, 0x1f1e1d1c1b1a1918, 0x1011121314151617, 0x1716151413121110,
                                                    0x08090a0b0c0d0e0f, 0x0f0e0d0c0b0a0908, 0x0001020304050607, 0x0706050403020100);
                entries[0] = _mm512_xor_si512(_mm512_permutexvar_epi8(each, both), _mm512_set_epi64(-1, 0, -1, 0, -1, 0, -1, 0));
            } else {
                const Bytes back = _mm512_broadcast_i32x4(_mm_set_epi32(0x0c0d0e0f, 0x08090a0b, 0x04050607, 0x00010203));
                entries[0] = Avx512::load(record);
                entries[1] = _mm512_xor_si512(_mm512_shuffle_epi8(entries[0], back), _mm512_set1_epi8(-1));
            }
        }

        // Bank of up to 32 tables: for each four entries 32 words; with 4 bits, tables of 16 bytes.
        const uint8_t* bank;
        BITMILL_INLINE void hold_bank(const uint8_t* tables) { bank = tables; }
        BITMILL_INLINE void from_bank(const uint8_t* ids, int mask) {
            if constexpr (bits == 4) {
                const auto one = [&](int r) {
                    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bank + 16 * (ids[r] & mask)));
                };
                entries[0] = _mm512_castsi128_si512(one(0));
                entries[0] = _mm512_inserti32x4(entries[0], one(1), 1);
                entries[0] = _mm512_inserti32x4(entries[0], one(2), 2);
                entries[0] = _mm512_inserti32x4(entries[0], one(3), 3);
            } else {
                const Ints id = _mm512_and_si512(row_ints<16>(ids), _mm512_set1_epi32(mask));
                for (int i = 0; i < vectors; ++i)
                    entries[i] = _mm512_permutex2var_epi32(Avx512::load(bank + 128 * i), id,
                                                           Avx512::load(bank + 128 * i + 64));
            }
        }

        BITMILL_INLINE Bytes look(Bytes code) const {
            if constexpr (bits == 4) {
                return _mm512_shuffle_epi8(entries[0], _mm512_and_si512(code, _mm512_set1_epi8(15)));
            } else {
                const Bytes row = fours();
                if constexpr (bits == 3)
                    return _mm512_permutex2var_epi8(entries[0], select<0x43>(code, row), entries[1]);
                else
                    return _mm512_permutexvar_epi8(select<(1 << bits) - 1>(code, row), entries[0]);
            }
        }
    };

    // Tables of 16 rows with entry[code] = first[code & 3] + second[code >> 2], stored as those of 3 bits.
    struct Sums : Lanes<3> {
        static constexpr int top = 3;
        BITMILL_INLINE Bytes look(Bytes code) const {
            return _mm512_add_epi8(_mm512_permutexvar_epi8(select<3>(code, fours()), entries[0]),
                                   _mm512_permutexvar_epi8(select<3>(shifted<2>(code), fours()), entries[1]));
        }
    };
};

}  // namespace bitmill
