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

    static constexpr int fixed_tokens = 4;
    // Entries of 16 rows and 4 columns as 16 bits each: two columns of all rows, then the other two.
    static BITMILL_INLINE void store_pairs(uint8_t* to, Bytes v) {
        const __m128i two = _mm_setr_epi8(0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1);  // -1: zero
        const __m256i first = _mm256_broadcastsi128_si256(two), second = _mm256_add_epi8(first, _mm256_set1_epi16(2));
        const auto put = [&](uint8_t* at, __m256i half) {
            const __m256i u = _mm256_xor_si256(half, same(bias));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm256_shuffle_epi8(u, first));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + 64), _mm256_shuffle_epi8(u, second));
        };
        put(to, v.a), put(to + 32, v.b);
    }
    struct Pairs {  // of signed 16 bits, eight rows: compilers keep structures of two registers in memory
        using Part = __m256i;
        static constexpr int rows = 8;
        static BITMILL_INLINE Part none() { return _mm256_setzero_si256(); }
        static BITMILL_INLINE Part load(const uint8_t* p) { return half(p); }
        static BITMILL_INLINE Part spread(const int8_t* x) { return Avx2::spread<16>(x).a; }
        static BITMILL_INLINE Part dot(Part sum, Part w, Part x) { return _mm256_add_epi32(sum, _mm256_madd_epi16(w, x)); }
        static BITMILL_INLINE void add(float* total, Part sum, const float* size, float step) {  // total += size * step * sum
            const __m256 both = _mm256_mul_ps(_mm256_loadu_ps(size), _mm256_set1_ps(step));
            _mm256_storeu_ps(total, _mm256_fmadd_ps(both, _mm256_cvtepi32_ps(sum), _mm256_loadu_ps(total)));
        }
    };

    // 64 sums of 16 bits, of which every table gives the low and the high bytes apart.
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
    static BITMILL_INLINE Floats rows(const uint8_t* bytes) {
        if constexpr (R == 16) {
            const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
            return to_float({_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8))});
        } else if constexpr (R == 4) {
            int32_t four;
            std::memcpy(&four, bytes, 4);
            return fours(_mm_cvtepi32_ps(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(four))));
        } else {
            return all(*bytes);
        }
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

    template <int R>
    static BITMILL_INLINE Floats named(const float* powers, const uint8_t* ids, int shift) {  // powers[id >> shift]
        float lanes[16];
        for (int l = 0; l < 16; ++l) lanes[l] = powers[ids[l * R / 16] >> shift];
        return {_mm256_loadu_ps(lanes), _mm256_loadu_ps(lanes + 8)};
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
        if constexpr (bits <= 3) {
            const __m256 entries = _mm256_loadu_ps(table);
            return {_mm256_permutevar8x32_ps(entries, at.a), _mm256_permutevar8x32_ps(entries, at.b)};
        } else {
            return {_mm256_i32gather_ps(table, at.a, 4), _mm256_i32gather_ps(table, at.b, 4)};
        }
    }
    static BITMILL_INLINE Floats fours_of(const float* p) {  // p[0] to p[3], four times
        const __m256 v = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
        return {v, v};
    }

    // One table for all 64 bytes, in pieces of 16 entries.
    template <int bits>
    struct Whole {
        static constexpr int top = bits - 1;  // where the code's last bit is expected
        static constexpr int pieces = bits <= 4 ? 1 : 1 << (bits - 4);
        __m256i entries[pieces];

        BITMILL_INLINE void load(const uint8_t* record) {
            for (int i = 0; i < pieces; ++i) {
                const __m128i piece = _mm_loadu_si128(reinterpret_cast<const __m128i*>(record + 16 * i));
                entries[i] = _mm256_xor_si256(_mm256_broadcastsi128_si256(piece), same(bias));
            }
        }

        BITMILL_INLINE __m256i look(__m256i code) const {
            if constexpr (bits <= 4) return _mm256_shuffle_epi8(entries[0], _mm256_and_si256(code, same(15)));
            if constexpr (bits < 8) code = _mm256_and_si256(code, same((1 << bits) - 1));
            __m256i found = _mm256_setzero_si256();
            for (int i = 0; i < pieces; ++i) {  // an index of another piece is at least 128 then, and finds 0
                const __m256i index = _mm256_adds_epu8(_mm256_xor_si256(code, same(i << 4)), same(0x70));
                found = _mm256_or_si256(found, _mm256_shuffle_epi8(entries[i], index));
            }
            return found;
        }
        BITMILL_INLINE Bytes look(Bytes code) const { return {look(code.a), look(code.b)}; }
    };

    // A table for every row: 4 rows of 4 entries in 16 bytes, two of these for 8 entries, or a row of 16.
    template <int bits>
    struct Lanes {
        static constexpr int top = bits == 3 ? 7 : bits - 1;
        static constexpr int vectors = bits == 3 ? 2 : 1;
        Bytes entries[vectors];

        BITMILL_INLINE void load(const uint8_t* record) {
            const __m256i flip = same(bias);
            for (int i = 0; i < vectors; ++i)
                entries[i] = {_mm256_xor_si256(half(record + 64 * i), flip),
                              _mm256_xor_si256(half(record + 64 * i + 32), flip)};
        }

        BITMILL_INLINE void load_mirrored(const uint8_t* record) {  // halves of tables, 8 or 4 bytes a row
            const __m256i flip = same(bias);
            if constexpr (bits == 4) {
                const __m128i each[2] = {_mm_set_epi64x(0x0001020304050607, 0x0706050403020100),
                                         _mm_set_epi64x(0x08090a0b0c0d0e0f, 0x0f0e0d0c0b0a0908)};
                const __m256i turn = _mm256_xor_si256(flip, _mm256_set_epi64x(-1, 0, -1, 0));
                const auto two = [&](const uint8_t* p) {
                    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
                    return _mm256_xor_si256(_mm256_set_m128i(_mm_shuffle_epi8(v, each[1]), _mm_shuffle_epi8(v, each[0])), turn);
                };
                entries[0] = {two(record), two(record + 16)};
            } else {
                const __m256i back = _mm256_broadcastsi128_si256(_mm_set_epi32(0x0c0d0e0f, 0x08090a0b, 0x04050607, 0x00010203));
                const auto turned = [&](__m256i v) { return _mm256_xor_si256(_mm256_shuffle_epi8(v, back), same(255)); };
                entries[0] = {_mm256_xor_si256(half(record), flip), _mm256_xor_si256(half(record + 32), flip)};
                entries[vectors - 1] = {turned(entries[0].a), turned(entries[0].b)};
            }
        }

        BITMILL_INLINE void from_bank(const uint8_t* bank, const uint8_t* ids, int mask) {
            uint8_t record[64 * vectors];
            if constexpr (bits == 4) {
                for (int r = 0; r < 4; ++r) std::memcpy(record + 16 * r, bank + 16 * (ids[r] & mask), 16);
            } else {
                for (int i = 0; i < vectors; ++i)
                    for (int r = 0; r < 16; ++r)
                        std::memcpy(record + 64 * i + 4 * r, bank + 128 * i + 4 * (ids[r] & mask), 4);
            }
            load(record);
        }

        static BITMILL_INLINE __m256i at(__m256i entries, __m256i code) {
            if constexpr (bits == 4) return _mm256_shuffle_epi8(entries, _mm256_and_si256(code, same(15)));
            const __m256i row = _mm256_set_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0,  //
                                                 0x0c0c0c0c, 0x08080808, 0x04040404, 0);
            const __m256i low = _mm256_and_si256(code, same(bits == 1 ? 1 : 3));
            return _mm256_shuffle_epi8(entries, _mm256_or_si256(low, row));
        }
        BITMILL_INLINE Bytes look(Bytes code) const {
            const Bytes first = {at(entries[0].a, code.a), at(entries[0].b, code.b)};
            if constexpr (bits != 3) return first;
            else return {_mm256_blendv_epi8(first.a, at(entries[1].a, code.a), code.a),
                         _mm256_blendv_epi8(first.b, at(entries[1].b, code.b), code.b)};
        }
    };

    // Tables of 16 rows with entry[code] = first[code & 3] + second[code >> 2], stored as those of 3 bits.
    struct Sums : Lanes<3> {
        static constexpr int top = 3;
        BITMILL_INLINE void from_bank(const uint8_t* bank, const uint8_t* ids, int mask) {
            Lanes<3>::from_bank(bank, ids, mask);
            entries[1] = differ(entries[1], {same(bias), same(bias)});  // it is taken off a sum once
        }
        BITMILL_INLINE Bytes look(Bytes code) const {
            const Bytes upper = shifted<2>(code);
            return {_mm256_add_epi8(at(entries[0].a, code.a), at(entries[1].a, upper.a)),
                    _mm256_add_epi8(at(entries[0].b, code.b), at(entries[1].b, upper.b))};
        }
    };
};

}  // namespace bitmill
