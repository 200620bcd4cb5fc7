// The kernels of step.h for an instruction set V.
#pragma once
#include <cmath>
#include <cstring>

#include "../simd/exp.h"
#include "../simd/inline.h"
#include "step.h"

namespace bitmill {

template <class V>
BITMILL_INLINE float dot(const float* a, const float* b, int64_t count) {
    typename V::Floats sums[2] = {V::zero(), V::zero()};
    int64_t i = 0;
    for (; i + 32 <= count; i += 32)
        for (int v = 0; v < 2; ++v)
            sums[v] = V::fma(V::template rows<16>(a + i + 16 * v), V::template rows<16>(b + i + 16 * v), sums[v]);
    for (; i + 16 <= count; i += 16) sums[0] = V::fma(V::template rows<16>(a + i), V::template rows<16>(b + i), sums[0]);
    float sum = V::sum(V::add(sums[0], sums[1]));
    for (; i < count; ++i) sum += a[i] * b[i];
    return sum;
}

template <class V>
void rms_norm(const float* x, const float* weight, float eps, int64_t count, float* out) {
    const float factor = 1.0f / std::sqrt(dot<V>(x, x, count) / static_cast<float>(count) + eps);
    for (int64_t i = 0; i < count; ++i) out[i] = weight[i] * (x[i] * factor);
}

template <class V>
void add_to(float* x, const float* y, const float* bias, int64_t count) {
    if (bias)
        for (int64_t i = 0; i < count; ++i) x[i] += y[i] + bias[i];
    else
        for (int64_t i = 0; i < count; ++i) x[i] += y[i];
}

template <class V>
void rope(float* x, const float* cos, const float* sin, int64_t dim) {
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

template <class V>
void gated(const float* gate, const float* gate_bias, const float* up, const float* up_bias, int64_t count, float* out) {
    if (gate_bias || up_bias) {
        for (int64_t i = 0; i < count; ++i) {
            const float g = gate[i] + (gate_bias ? gate_bias[i] : 0.0f), u = up[i] + (up_bias ? up_bias[i] : 0.0f);
            out[i] = g / (1.0f + exponential(-g)) * u;
        }
        return;
    }
    for (int64_t i = 0; i < count; ++i) out[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

// Weights of a head: exp(score - largest), whose sum is returned.
template <class V>
BITMILL_INLINE float soften(float* scores, int64_t length) {
    float most = scores[0];
    for (int64_t i = 1; i < length; ++i) most = scores[i] > most ? scores[i] : most;
    for (int64_t i = 0; i < length; ++i) scores[i] = exponential(scores[i] - most);
    typename V::Floats sums = V::zero();
    int64_t i = 0;
    for (; i + 16 <= length; i += 16) sums = V::add(sums, V::template rows<16>(scores + i));
    float sum = V::sum(sums);
    for (; i < length; ++i) sum += scores[i];
    return sum;
}

// 16 N columns of out = factor * sum over positions of weight * value.
template <class V, int N>
BITMILL_INLINE void mix(const float* weights, const float* values, int64_t length, int64_t dim, float factor, float* out) {
    typename V::Floats sums[N];
    for (auto& s : sums) s = V::zero();
    for (int64_t p = 0; p < length; ++p) {
        const auto weight = V::all(weights[p]);
        for (int v = 0; v < N; ++v) sums[v] = V::fma(weight, V::template rows<16>(values + p * dim + 16 * v), sums[v]);
    }
    for (int v = 0; v < N; ++v) V::store(out + 16 * v, V::mul(sums[v], V::all(factor)));
}

template <class V>
void attend(const float* q, const float* keys, const float* values, int64_t heads, int64_t length, int64_t dim, float scaling,
            float* scores, float* out) {
    for (int64_t p = 0; p < length; ++p)
        for (int64_t h = 0; h < heads; ++h) scores[h * length + p] = scaling * dot<V>(q + h * dim, keys + p * dim, dim);
    for (int64_t h = 0; h < heads; ++h) {
        float* weights = scores + h * length;
        float* to = out + h * dim;
        const float factor = 1.0f / soften<V>(weights, length);
        int64_t c = 0;
        for (; c + 64 <= dim; c += 64) mix<V, 4>(weights, values + c, length, dim, factor, to + c);
        for (; c + 16 <= dim; c += 16) mix<V, 1>(weights, values + c, length, dim, factor, to + c);
        for (; c < dim; ++c) {
            float sum = 0;
            for (int64_t p = 0; p < length; ++p) sum += weights[p] * values[p * dim + c];
            to[c] = sum * factor;
        }
    }
}

// To the nearest, ties to even, as conversions of the machine do: added to a number whose last bit is worth as much as
// that of the half, the sum is rounded where the half ends.
template <class V>
void to_fp16(const float* x, int64_t count, uint16_t* out) {
    constexpr float most = 65504.0f;
    for (int64_t i = 0; i < count; ++i) {
        const float value = x[i] < -most ? -most : x[i] > most ? most : x[i];
        uint32_t bits, sum_bits;
        std::memcpy(&bits, &value, 4);
        const uint32_t twice = bits + bits, sign = bits >> 16 & 0x8000u;
        const uint32_t exponent = (twice & 0xff000000u) > 0x71000000u ? twice & 0xff000000u : 0x71000000u;
        const uint32_t added = (exponent >> 1) + 0x07800000u;
        float by;
        std::memcpy(&by, &added, 4);
        const float sum = 4 * std::fabs(value) + by;
        std::memcpy(&sum_bits, &sum, 4);
        const uint32_t half = (sum_bits >> 13 & 0x7c00u) + (sum_bits & 0x0fffu);
        out[i] = static_cast<uint16_t>(sign | (twice > 0xff000000u ? 0x7e00u : half));
    }
}

template <class V>
void dense_rows(const float* weights, int64_t columns, const float* x, float* y, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) y[r] = dot<V>(weights + r * columns, x, columns);
}

template <class V>
void dense_bf16_rows(const uint16_t* weights, int64_t columns, const float* x, float* y, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
        const uint16_t* row = weights + r * columns;
        typename V::Floats sums[2] = {V::zero(), V::zero()};
        int64_t i = 0;
        for (; i + 32 <= columns; i += 32)
            for (int v = 0; v < 2; ++v)
                sums[v] = V::fma(V::of_bf16(row + i + 16 * v), V::template rows<16>(x + i + 16 * v), sums[v]);
        float sum = V::sum(V::add(sums[0], sums[1]));
        for (; i < columns; ++i) {
            const uint32_t bits = static_cast<uint32_t>(row[i]) << 16;
            float weight;
            std::memcpy(&weight, &bits, 4);
            sum += weight * x[i];
        }
        y[r] = sum;
    }
}

template <class V>
constexpr StepKernels step_kernels = {rms_norm<V>, add_to<V>, rope<V>, gated<V>, attend<V>, to_fp16<V>, dense_rows<V>, dense_bf16_rows<V>};

}  // namespace bitmill
