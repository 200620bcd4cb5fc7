// The kernels of sparse.h for an instruction set V.
#pragma once
#include <cstring>

#include "../simd/inline.h"
#include "sparse.h"

namespace bitmill {

// Sixteen entries at a time share a conversion; the inputs are gathered one by one, which no instruction does faster.
template <class V, class Place>
void sparse_add_of(const Sparse& s, const float* x, int64_t tokens, float* y, int64_t first, int64_t last) {
    const Place* places = static_cast<const Place*>(s.places);
    for (int64_t t = 0; t < tokens; ++t, x += s.columns, y += s.rows)
        for (int64_t r = first; r < last; ++r) {
            float sum = 0;
            for (int64_t e = s.starts[r]; e < s.starts[r + 1]; e += 16) {
                const int64_t left = s.starts[r + 1] - e, count = left < 16 ? left : 16;
                uint16_t halves[16] = {};
                float values[16];
                std::memcpy(halves, s.values + e, count * sizeof(uint16_t));
                V::store(values, V::template rows<16>(halves));
                for (int64_t i = 0; i < count; ++i) sum += values[i] * x[places[e + i]];
            }
            y[r] += sum;
        }
}

template <class V>
void sparse_add_with(const Sparse& s, const float* x, int64_t tokens, float* y, int64_t first, int64_t last) {
    (s.wide ? sparse_add_of<V, uint32_t> : sparse_add_of<V, uint16_t>)(s, x, tokens, y, first, last);
}

template <class V>
constexpr SparseKernels sparse_kernels = {sparse_add_with<V>};

}  // namespace bitmill
