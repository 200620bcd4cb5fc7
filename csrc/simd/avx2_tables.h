// Tables of bytes in vectors of AVX2, 16 entries a lookup. Included by avx2.h.
#pragma once
#include "avx2.h"

namespace bitmill {

// One table for all 64 bytes, in pieces of 16 entries. Where entries are the codes themselves, as those of uniform grids
// are, many pieces would be looked up for nothing.
template <int bits>
struct Avx2::Whole {
    static constexpr int top = bits - 1;  // where the code's last bit is expected
    static constexpr int pieces = bits <= 4 ? 1 : 1 << (bits - 4);
    __m256i entries[pieces];
    bool codes;  // of more than 4 bits

    BITMILL_INLINE void load(const uint8_t* record) {
        load_small(record, bias);
        if constexpr (bits > 4) {
            int alike = 0;
            while (alike < 1 << bits && record[alike] == alike) ++alike;
            codes = alike == 1 << bits;
        }
    }

    BITMILL_INLINE void load_small(const uint8_t* record, int less = 0) {  // for dot_small, or less `less`
        codes = false;
        for (int i = 0; i < pieces; ++i) {
            const __m128i piece = _mm_loadu_si128(reinterpret_cast<const __m128i*>(record + 16 * i));
            entries[i] = _mm256_xor_si256(_mm256_broadcastsi128_si256(piece), same(less));
        }
    }

    BITMILL_INLINE __m256i look(__m256i code) const {
        if constexpr (bits <= 4) return _mm256_shuffle_epi8(entries[0], _mm256_and_si256(code, same(15)));
        if (codes) return _mm256_xor_si256(bits < 8 ? _mm256_and_si256(code, same((1 << bits) - 1)) : code, same(bias));
        return find<0, bits - 4>(_mm256_and_si256(code, same(15)), code);
    }
    BITMILL_INLINE Bytes look(Bytes code) const { return {look(code.a), look(code.b)}; }

    // Of 2^count pieces the one that bits 4 and up of the code name.
    template <int first, int count>
    BITMILL_INLINE __m256i find(__m256i low, __m256i code) const {
        if constexpr (count <= 0) {
            return _mm256_shuffle_epi8(entries[first], low);
        } else {
            const __m256i lower = find<first, count - 1>(low, code), upper = find<first + (1 << (count - 1)), count - 1>(low, code);
            return _mm256_blendv_epi8(lower, upper, _mm256_slli_epi16(code, 4 - count));
        }
    }
};

// 32 words: of the first 16 the bytes 0 and 2, then the bytes 1 and 3; likewise of the others.
struct Avx2::Words {
    __m256i planes[4];

    BITMILL_INLINE void load(const uint8_t* words) {
        const __m256i by_byte = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
        const __m256i turned = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        const auto eight = [&](int i) {
            return _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(half(words + 32 * i), by_byte), turned);
        };
        for (int i = 0; i < 4; i += 2) {
            const __m256i first = eight(i), second = eight(i + 1);
            planes[i] = _mm256_unpacklo_epi64(first, second);
            planes[i + 1] = _mm256_unpackhi_epi64(first, second);
        }
    }

    // Bytes 0 and 2 of 16 words, and bytes 1 and 3.
    BITMILL_INLINE Bytes bytes_of(__m256i id) const {
        const __m256i upper = _mm256_slli_epi16(id, 3);
        const auto bytes = [&](int i) {
            return _mm256_blendv_epi8(_mm256_shuffle_epi8(planes[i], id), _mm256_shuffle_epi8(planes[i + 2], id), upper);
        };
        return {bytes(0), bytes(1)};
    }
    BITMILL_INLINE Bytes look(__m128i ids) const {  // word after word
        const Bytes of = bytes_of(_mm256_broadcastsi128_si256(_mm_shuffle_epi32(ids, 0xd8)));
        const __m256i low = _mm256_unpacklo_epi8(of.a, of.b), high = _mm256_unpackhi_epi8(of.a, of.b);
        const __m256i first = _mm256_permute2x128_si256(low, high, 0x20), last = _mm256_permute2x128_si256(low, high, 0x31);
        return {_mm256_unpacklo_epi16(first, last), _mm256_unpackhi_epi16(first, last)};
    }
    BITMILL_INLINE Bytes look_turned(__m128i ids) const {  // of four words byte after byte
        const Bytes of = bytes_of(_mm256_broadcastsi128_si256(ids));
        return {_mm256_permute4x64_epi64(_mm256_unpacklo_epi32(of.a, of.b), 0xd8),
                _mm256_permute4x64_epi64(_mm256_unpackhi_epi32(of.a, of.b), 0xd8)};
    }
};

// A table for every row: 4 rows of 4 entries in 16 bytes, two of these for 8 entries, or a row of 16.
template <int bits>
struct Avx2::Lanes {
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

    // Bank of up to 32 tables: for each four entries 32 words; with 4 bits, tables of 16 bytes.
    const uint8_t* bank;
    Words words[bits == 4 ? 1 : vectors];
    BITMILL_INLINE void hold_bank(const uint8_t* tables) {
        bank = tables;
        if constexpr (bits != 4) words[0].load(tables);
        if constexpr (bits == 3) words[1].load(tables + 128);
    }
    BITMILL_INLINE void from_bank(const uint8_t* ids, int mask) {
        if constexpr (bits == 4) {
            const auto one = [&](int r) {
                return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bank + 16 * (ids[r] & mask)));
            };
            entries[0] = {_mm256_set_m128i(one(1), one(0)), _mm256_set_m128i(one(3), one(2))};
        } else {
            const __m128i id = masked_ids(ids, mask);
            entries[0] = words[0].look(id);
            if constexpr (bits == 3) entries[1] = words[1].look(id);
        }
    }

    static BITMILL_INLINE __m256i at(__m256i entries, __m256i code) {
        if constexpr (bits == 4) return _mm256_shuffle_epi8(entries, _mm256_and_si256(code, same(15)));
        const __m256i low = _mm256_and_si256(code, same(bits == 1 ? 1 : 3));
        return _mm256_shuffle_epi8(entries, _mm256_or_si256(low, _mm256_slli_epi32(four_rows(), 2)));
    }
    BITMILL_INLINE Bytes look(Bytes code) const { return {at(entries[0].a, code.a), at(entries[0].b, code.b)}; }
    BITMILL_INLINE Bytes look(Bytes code, Bytes third) const {  // bit 7 of the latter
        const auto one = [&](__m256i first, __m256i second, __m256i code, __m256i bit) {
            return _mm256_blendv_epi8(at(first, code), at(second, code), bit);
        };
        return {one(entries[0].a, entries[1].a, code.a, third.a), one(entries[0].b, entries[1].b, code.b, third.b)};
    }
};

// Tables of 16 rows with entry[code] = first[code & 3] + second[code >> 2], stored as those of 3 bits.
struct Avx2::Sums : Avx2::Lanes<3> {
    static constexpr int top = 3;
    BITMILL_INLINE void from_bank(const uint8_t* ids, int mask) {
        const __m128i id = masked_ids(ids, mask);
        entries[0] = words[0].look(id);
        entries[1] = words[1].look_turned(id);  // so that upper bits need no shift
    }
    BITMILL_INLINE Bytes look(Bytes code) const {
        const auto one = [](__m256i first, __m256i second, __m256i code) {
            const __m256i upper = _mm256_or_si256(_mm256_and_si256(code, same(12)), four_rows());
            return _mm256_add_epi8(at(first, code), _mm256_shuffle_epi8(second, upper));
        };
        return {one(entries[0].a, entries[1].a, code.a), one(entries[0].b, entries[1].b, code.b)};
    }
};

}  // namespace bitmill
