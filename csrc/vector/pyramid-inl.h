// Integer points with sum |y_i| = K from their numbers, and their lengths: numerics/pyramid.py has the numbering.
//
// A number is split into those of its halves: 16 coordinates to 8 and 8, to 4, to 2; of two coordinates the point is
// computed outright. Numbers of no point give some vector, as there.
#pragma once
#include <cmath>
#include <cstdint>

#include "../simd/inline.h"
#include "vector.h"

namespace bitmill {

constexpr int pyramid_pulses[] = {4, 12, 27, 58};  // K, whose points 16 * bits bits can number

template <class V>
struct Pyramid {
    static constexpr int width = 16, most = 64;  // pulses, in rows of whole vectors
    const float* lengths;
    int bits, pulses = 0, searched;
    uint64_t counts[width + 1][most];       // [d][k]: points of d coordinates with k pulses, modulo 2^64
    // [halves of 8, 4, 2][k][j]: points with fewer than j of k in the first half
    uint64_t offsets[3][most][most];

    explicit Pyramid(const Vectors& w) : Pyramid(w.bits, w.table) {}

    Pyramid(int bits, const float* lengths) : lengths(lengths), bits(bits) {
        for (int k = 0; k < most; ++k) counts[0][k] = k == 0;
        for (int d = 1; d <= width; ++d)
            for (int k = 0; k < most; ++k)
                counts[d][k] = k == 0 ? 1 : counts[d - 1][k] + counts[d][k - 1] + counts[d - 1][k - 1];
        pulses = pyramid_pulses[bits - 1];
        searched = (pulses + 8) / 8 * 8;
        for (int level = 0; level < 3; ++level) {
            const uint64_t* half = counts[8 >> level];
            for (int k = 0; k <= pulses; ++k) {
                uint64_t below = 0;
                for (int j = 0; j < most; ++j) {
                    offsets[level][k][j] = j <= k ? below : ~uint64_t{0};
                    if (j <= k) below += half[j] * half[k - j];
                }
            }
        }
    }

    struct Part {
        uint64_t number;
        int pulses;
    };

    template <int level>
    BITMILL_INLINE void split(const Part& whole, Part* halves) const {
        const uint64_t* row = offsets[level][whole.pulses];
        int found = 0;  // a count, not a search: it has no branches and fills vectors
        for (int j = 0; j < searched; ++j) found += row[j] <= whole.number;
        const int first = found - 1 < whole.pulses ? found - 1 : whole.pulses, rest = whole.pulses - first;
        const uint64_t number = whole.number - row[first], each = counts[8 >> level][rest];
        const uint64_t left = level == 2 ? static_cast<uint32_t>(number) / static_cast<uint32_t>(each)
                                         : number / each;
        halves[0] = {left, first};
        halves[1] = {number - left * each, rest};
    }

    // Of k pulses j are in the first coordinate: 2 points for j = 0 and j = k, 4 for those between.
    static BITMILL_INLINE void pair(const Part& part, int32_t* y) {
        const int k = part.pulses, most_number = k ? 4 * k - 1 : 0;
        const int number = part.number < static_cast<uint64_t>(most_number) ? static_cast<int>(part.number)
                                                                            : most_number;
        const int first = k ? (number + 2) >> 2 : 0, signs = number + 2;
        const int negative = first == k ? signs & 1 : signs >> 1 & 1;
        y[0] = negative ? -first : first;
        y[1] = signs & 1 ? first - k : k - first;
    }

    static BITMILL_INLINE uint64_t bits_at(const uint32_t* words, int64_t at, int count) {  // up to 16
        const int64_t word = at / 32;
        const int shift = static_cast<int>(at % 32);
        uint64_t held = words[word] >> shift;
        if (shift + count > 32) held |= static_cast<uint64_t>(words[word + 1]) << (32 - shift);
        return held & ((1u << count) - 1);
    }

    // The point of block b, and its gain.
    BITMILL_INLINE int coordinates(const uint32_t* words, int64_t b, int32_t* y) const {
        const int64_t at = b * (16 * bits + 4);
        Part whole{0, pulses}, eights[2], fours[4], twos[8];
        for (int i = 0; i < bits; ++i) whole.number |= bits_at(words, at + 16 * i, 16) << 16 * i;
        split<0>(whole, eights);
        for (int i = 0; i < 2; ++i) split<1>(eights[i], fours + 2 * i);
        for (int i = 0; i < 4; ++i) split<2>(fours[i], twos + 2 * i);
        for (int i = 0; i < 8; ++i) pair(twos[i], y + 2 * i);
        return static_cast<int>(bits_at(words, at + 16 * bits, 4));
    }

    // The inverse, of y with the right number of pulses.
    uint64_t number(const int8_t* y) const {
        uint64_t found[8];
        int held[8];
        for (int i = 0; i < 8; ++i) {
            const int a = y[2 * i], b = y[2 * i + 1], first = a < 0 ? -a : a;
            held[i] = first + (b < 0 ? -b : b);
            if (!held[i]) found[i] = 0;
            else if (first == 0) found[i] = b < 0;
            else if (first == held[i]) found[i] = static_cast<uint64_t>(4 * first - 2 + (a < 0));
            else found[i] = static_cast<uint64_t>(4 * first - 2 + 2 * (a < 0) + (b < 0));
        }
        for (int level = 2, parts = 8; level >= 0; --level, parts /= 2)
            for (int i = 0; i < parts / 2; ++i) {
                const int first = held[2 * i], rest = held[2 * i + 1],
                          all = first + rest < most ? first + rest : most - 1;
                found[i] = offsets[level][all][first] + found[2 * i] * counts[8 >> level][rest] +
                           found[2 * i + 1];
                held[i] = all;
            }
        return found[0];
    }

    BITMILL_INLINE void points(const uint32_t* words, int64_t first, int64_t count, float* out) const {
        for (int64_t b = first; b < first + count; ++b, out += width) {
            int32_t y[width], power = 0;
            const float length = lengths[coordinates(words, b, y)];
            for (int i = 0; i < width; ++i) power += y[i] * y[i];
            const float norm = std::sqrt(static_cast<float>(power));
            for (int i = 0; i < width; ++i) out[i] = static_cast<float>(y[i]) / norm * length;
        }
    }
};

}  // namespace bitmill
