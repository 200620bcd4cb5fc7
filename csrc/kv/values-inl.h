// Sums of a unit's values: a lane is a channel, weights (R, 32) are those of a head's R query heads.
#pragma once
#include "codes-inl.h"
#include "kv.h"

namespace bitmill {

template <class V, int R>
using KvSums = typename V::Floats[R][chains<V, R>];

template <class V, int R>
BITMILL_INLINE void clear(KvSums<V, R>& sums) {
    for (auto& some : sums)
        for (auto& sum : some) sum = V::zero();
}

template <class V, int R>
BITMILL_INLINE void mix_token(const typename V::Floats& value, const float* weights, int chain, KvSums<V, R>& sums) {
    for (int i = 0; i < R; ++i) sums[i][chain] = V::fma(V::all(weights[kv_tokens * i]), value, sums[i][chain]);
}

// To 16 channels of R query heads, whose sums have the stride `stride`.
template <class V, int R>
BITMILL_INLINE void add_sums(const KvSums<V, R>& sums, int64_t stride, float* out) {
    for (int i = 0; i < R; ++i) {
        auto sum = V::add(V::template rows<16>(out + i * stride), sums[i][0]);
        if constexpr (chains<V, R> > 1) sum = V::add(sum, sums[i][1]);
        V::store(out + i * stride, sum);
    }
}

// `blocks` times 16 channels of a page, before zeros.
template <class V, int bits, int R>
void mix(const uint32_t* words, const float* sixteen, int64_t blocks, const float* weights, int64_t stride, float* out) {
    const KvLevels<V, bits> levels(sixteen);
    for (int64_t block = 0; block < blocks; ++block, words += 16 * bits, out += 16) {
        KvSums<V, R> sums;
        clear<V, R>(sums);
        unrolled<V, 0, kv_tokens>([&](auto t) __attribute__((always_inline)) {
            mix_token<V, R>(levels.at(code_at<V, bits>(words, t)), weights + t, t % chains<V, R>, sums);
        });
        add_sums<V, R>(sums, stride, out);
    }
}

// Loose tokens, as in score_fp16.
template <class V, int R>
void mix_fp16(const uint16_t* values, const int32_t* which, int64_t count, int64_t dim, const float* weights, int64_t stride,
               float* out) {
    for (int64_t c = 0; c < dim; c += 16) {
        KvSums<V, R> sums;
        clear<V, R>(sums);
        for (int64_t t = 0; t < count; ++t)
            mix_token<V, R>(V::template rows<16>(values + which[t] * dim + c), weights + t, 0, sums);
        add_sums<V, R>(sums, stride, out + c);
    }
}

// Adds outliers (n, 32) to R query heads of every head: weights (query heads, 32), sums with the stride `stride`.
template <class V, int R, class Index>
void mix_outliers(const KvAttention& a, const float* values, const Index* indices, const float* weights, int64_t stride, float* out) {
    const int64_t dim = a.pages.dim, group = a.group();
    const uint64_t inverse = over(dim);
    for (int64_t e = 0; e < a.pages.value.outliers; ++e)
        for (int64_t t = 0; t < kv_tokens; ++t) {
            const int64_t channel = indices[e * kv_tokens + t], head = channel * inverse >> 32;
            if (channel >= a.pages.channels()) continue;  // pages may come from a file
            const float value = values[e * kv_tokens + t];
            const float* from = weights + head * group * kv_tokens + t;
            float* to = out + head * (group * stride - dim) + channel;
            for (int i = 0; i < R; ++i) to[i * stride] += value * from[i * kv_tokens];
        }
}

}  // namespace bitmill
