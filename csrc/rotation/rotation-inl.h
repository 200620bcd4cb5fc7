// The kernels of rotation.h for an instruction set V.
#pragma once
#include <cstring>

#include "../simd/inline.h"
#include "rotation.h"

namespace bitmill {

// inner is a multiple of 16.
template <class V>
BITMILL_INLINE void butterflies(const RotationStep& s, float* x) {
    for (int64_t half = s.inner; half < s.order * s.inner; half *= 2)
        for (int64_t from = 0; from < s.width; from += 2 * half)
            for (int64_t i = from; i < from + half; i += 16) {
                const auto a = V::template rows<16>(x + i), b = V::template rows<16>(x + i + half);
                V::store(x + i, V::add(a, b));
                V::store(x + i + half, V::sub(a, b));
            }
}

// One vector of `order` inputs, with the stride `inner`; 64 outputs at a time.
template <class V>
BITMILL_INLINE void matrix_of_one(const RotationStep& s, const float* matrix, const float* x, float* y) {
    const int64_t stride = padded_order(s.order);
    for (int64_t i = 0; i < s.order; i += 64) {
        const int64_t vectors = (stride - i) / 16, used = vectors < 4 ? vectors : 4;
        typename V::Floats sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
        for (int64_t j = 0; j < s.order; ++j) {
            const auto one = V::all(x[j * s.inner]);
            for (int64_t v = 0; v < used; ++v)
                sums[v] = V::fma(one, V::template rows<16>(matrix + j * stride + i + 16 * v), sums[v]);
        }
        for (int64_t v = 0; v < used; ++v) {
            float lanes[16];
            V::store(lanes, sums[v]);
            for (int64_t k = i + 16 * v; k < s.order && k < i + 16 * v + 16; ++k) y[k * s.inner] = lanes[k % 16];
        }
    }
}

// As above for 16 adjacent vectors, whose elements have the stride `inner`; 4 outputs at a time share the loads.
template <class V>
BITMILL_INLINE void matrix_of_sixteen(const RotationStep& s, const float* matrix, const float* x, float* y) {
    const int64_t stride = padded_order(s.order);
    for (int64_t i = 0; i < s.order; i += 4) {
        typename V::Floats sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
        for (int64_t j = 0; j < s.order; ++j) {
            const auto in = V::template rows<16>(x + j * s.inner);
            for (int v = 0; v < 4; ++v) sums[v] = V::fma(V::all(matrix[j * stride + i + v]), in, sums[v]);
        }
        for (int64_t v = 0; v < 4 && i + v < s.order; ++v) V::store(y + (i + v) * s.inner, sums[v]);
    }
}

template <class V>
BITMILL_INLINE void matrix(const RotationStep& s, const float* matrix, const float* x, float* y) {
    for (int64_t from = 0; from < s.width; from += s.order * s.inner) {
        int64_t n = from;
        for (; n + 16 <= from + s.inner; n += 16) matrix_of_sixteen<V>(s, matrix, x + n, y + n);
        for (; n < from + s.inner; ++n) matrix_of_one<V>(s, matrix, x + n, y + n);
    }
}

template <class V>
void rotate_with(const Rotation& r, float* x, float* spare) {
    for (const RotationStep* s = r.steps; s < r.steps + r.count; ++s) {
        float* in = x + s->start;
        const float* numbers = r.numbers + s->at;
        switch (s->turn) {
            case Turn::multiply:
                for (int64_t i = 0; i < s->width; ++i) in[i] *= numbers[i];
                continue;
            case Turn::butterflies:
                butterflies<V>(*s, in);
                continue;
            case Turn::permute:
                for (int64_t i = 0; i < s->width; ++i) spare[i] = in[r.orders[s->at + i]];
                break;
            case Turn::matrix:
                matrix<V>(*s, numbers, in, spare);
                break;
        }
        std::memcpy(in, spare, s->width * sizeof(float));
    }
}

template <class V>
constexpr RotationKernels rotation_kernels = {rotate_with<V>};

}  // namespace bitmill
