// Products of floats for many tokens: a tile of tokens times up to 16 columns of a matrix whose rows are `w_stride` apart.
#pragma once
#include <cstdint>
#include <cstring>

#include "../simd/inline.h"

namespace bitmill {

constexpr int tile_tokens = 6;  // whose sums stay in registers

template <class V, int T>
BITMILL_INLINE void tile_of(const float* x, int64_t x_stride, const float* w, int64_t w_stride, int64_t columns, float* y,
                            int64_t y_stride, int64_t count, bool add) {
    float lanes[16] = {};
    typename V::Floats sums[T];
    for (int t = 0; t < T; ++t) {
        sums[t] = V::zero();
        if (add && count == 16) sums[t] = V::template rows<16>(y + t * y_stride);
        else if (add) std::memcpy(lanes, y + t * y_stride, count * sizeof(float)), sums[t] = V::template rows<16>(lanes);
    }
    for (int64_t c = 0; c < columns; ++c) {
        const auto row = V::template rows<16>(w + c * w_stride);
        for (int t = 0; t < T; ++t) sums[t] = V::fma(V::all(x[t * x_stride + c]), row, sums[t]);
    }
    for (int t = 0; t < T; ++t) {
        if (count == 16) V::store(y + t * y_stride, sums[t]);
        else V::store(lanes, sums[t]), std::memcpy(y + t * y_stride, lanes, count * sizeof(float));
    }
}

template <class V, int T>
BITMILL_INLINE void last_tile(const float* x, int64_t x_stride, int64_t tokens, const float* w, int64_t w_stride, int64_t columns,
                              float* y, int64_t y_stride, int64_t count, bool add) {
    if constexpr (T > 0) {
        if (tokens == T) tile_of<V, T>(x, x_stride, w, w_stride, columns, y, y_stride, count, add);
        else last_tile<V, T - 1>(x, x_stride, tokens, w, w_stride, columns, y, y_stride, count, add);
    }
}

template <class V>
void multiply_tiles(const float* x, int64_t x_stride, int64_t tokens, const float* w, int64_t w_stride, int64_t columns, float* y,
                    int64_t y_stride, int64_t count, bool add) {
    for (; tokens >= tile_tokens; tokens -= tile_tokens, x += tile_tokens * x_stride, y += tile_tokens * y_stride)
        tile_of<V, tile_tokens>(x, x_stride, w, w_stride, columns, y, y_stride, count, add);
    last_tile<V, tile_tokens - 1>(x, x_stride, tokens, w, w_stride, columns, y, y_stride, count, add);
}

}  // namespace bitmill
