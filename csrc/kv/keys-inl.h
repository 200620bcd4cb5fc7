// Scores of a unit: keys are decoded half a page at a time, a lane a token, and serve all query heads.
#pragma once
#include "codes-inl.h"
#include "kv.h"

namespace bitmill {

// Channels [16 n, 16 n + 16) of 16 tokens. scale, zero: of the channels, or, by_token, of the tokens.
template <class V, int bits, bool by_token, int first>
BITMILL_INLINE void decode_block(const uint32_t* words, const KvLevels<V, bits>& levels, const float* scale, const float* zero,
                                 float* out) {
    const auto of = [&](const float* numbers, int i) {
        if constexpr (by_token) return V::template rows<16>(numbers);
        else return V::all(numbers[i]);
    };
    unrolled<V, first, 16>([&](auto n) __attribute__((always_inline)) {
        const auto level = levels.at(code_at<V, bits>(words, n));
        V::store(out + 16 * (n - first), V::fma(level, of(scale, n - first), of(zero, n - first)));
    });
}

// The same where each channel has a table (channels, 16) of its own, and no scale.
template <class V, int bits, int first>
BITMILL_INLINE void look_up_block(const uint32_t* words, const float* tables, float* out) {
    unrolled<V, first, 16>([&](auto n) __attribute__((always_inline)) {
        const KvLevels<V, bits> levels(tables + 16 * (n - first));
        V::store(out + 16 * (n - first), levels.at(code_at<V, bits>(words, n)));
    });
}

// A head's keys of half a page, (dim, 16), by the tables of its channels.
template <class V, int bits>
void look_up_keys(const uint32_t* words, const float* tables, int64_t dim, float* tile) {
    for (int64_t c = 0; c < dim; c += 16) {
        if (c % 32 == 0) look_up_block<V, bits, 0>(words, tables + 16 * c, tile + 16 * c);
        else look_up_block<V, bits, 16>(words, tables + 16 * c, tile + 16 * c);
        if (c % 32) words += 16 * bits;
    }
}

// A head's keys of half a page, (dim, 16). The numbers of a token's next group are 32 further.
template <class V, int bits, bool by_token>
void decode_keys(const uint32_t* words, const float* sixteen, int64_t dim, int64_t width, const float* scale, const float* zero,
                 float* tile) {
    const KvLevels<V, bits> levels(sixteen);
    for (int64_t c = 0; c < dim; c += 16) {
        const int64_t at = by_token ? c / width * kv_tokens : c;
        if (c % 32 == 0) decode_block<V, bits, by_token, 0>(words, levels, scale + at, zero + at, tile + 16 * c);
        else decode_block<V, bits, by_token, 16>(words, levels, scale + at, zero + at, tile + 16 * c);
        if (c % 32) words += 16 * bits;
    }
}

// Scores of 16 tokens for R query heads, q (R, dim), scores (R, 32). Keys are turned by RoPE on the way, by the angles
// of a page's tokens: q is turned back by the page's own.
template <class V, int R, bool turned>
void score(const float* tile, const float* q, int64_t dim, const float* turns, float* scores) {
    constexpr int C = chains<V, R>;
    const int64_t half = dim / 2;
    typename V::Floats sums[R][C];
    for (auto& some : sums)
        for (auto& sum : some) sum = V::zero();
    for (int64_t f = 0; f < half; ++f) {
        auto a = V::template rows<16>(tile + 16 * f), b = V::template rows<16>(tile + 16 * (f + half));
        if constexpr (turned) {
            const auto cos = V::template rows<16>(turns + 32 * f), sin = V::template rows<16>(turns + 32 * f + 16);
            const auto other = V::fma(a, sin, V::mul(b, cos));
            a = V::fnma(b, sin, V::mul(a, cos));
            b = other;
        }
        for (int i = 0; i < R; ++i) {
            sums[i][0] = V::fma(V::all(q[i * dim + f]), a, sums[i][0]);
            sums[i][C - 1] = V::fma(V::all(q[i * dim + f + half]), b, sums[i][C - 1]);
        }
    }
    for (int i = 0; i < R; ++i) V::store(scores + kv_tokens * i, C == 1 ? sums[i][0] : V::add(sums[i][0], sums[i][C - 1]));
}

// Loose tokens, fp16 (.., dim), of which `count` at the places `which`, for R query heads.
template <class V, int R>
void score_fp16(const uint16_t* keys, const int32_t* which, int64_t count, const float* q, int64_t dim, float* scores) {
    for (int64_t t = 0; t < count; ++t) {
        typename V::Floats sums[R];
        for (auto& sum : sums) sum = V::zero();
        for (int64_t c = 0; c < dim; c += 16) {
            const auto key = V::template rows<16>(keys + which[t] * dim + c);
            for (int i = 0; i < R; ++i) sums[i] = V::fma(V::template rows<16>(q + i * dim + c), key, sums[i]);
        }
        for (int i = 0; i < R; ++i) scores[kv_tokens * i + t] = V::sum(sums[i]);
    }
}

// Outliers (2 n, 16) of half a page, to its decoded keys (channels, 16).
template <class Index>
BITMILL_INLINE void add_outliers(const KvPages& p, int64_t half, const float* from, const Index* indices, float* tile) {
    for (int64_t e = half; e < 2 * p.key.outliers; e += 2)
        for (int64_t lane = 0; lane < 16; ++lane) {
            const int64_t channel = indices[16 * e + lane];
            if (channel < p.channels()) tile[16 * channel + lane] += from[16 * e + lane];  // pages may come from a file
        }
}

}  // namespace bitmill
