// The kernels of step.h for an instruction set V.
#pragma once
#include <cmath>
#include <cstring>

#include "../simd/exp.h"
#include "../simd/inline.h"
#include "step.h"
#include "tile-inl.h"

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
BITMILL_INLINE float total(const float* x, int64_t count) {
    typename V::Floats sums = V::zero();
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) sums = V::add(sums, V::template rows<16>(x + i));
    float sum = V::sum(sums);
    for (; i < count; ++i) sum += x[i];
    return sum;
}

template <class V>
void rms_norm(const float* x, const float* weight, float eps, int64_t count, float* out) {
    const float factor = 1.0f / std::sqrt(dot<V>(x, x, count) / static_cast<float>(count) + eps);
    for (int64_t i = 0; i < count; ++i) out[i] = weight[i] * (x[i] * factor);
}

template <class V>
void layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t count, float* out) {
    const float mean = total<V>(x, count) / static_cast<float>(count);
    for (int64_t i = 0; i < count; ++i) out[i] = x[i] - mean;
    const float factor = 1.0f / std::sqrt(dot<V>(out, out, count) / static_cast<float>(count) + eps);
    if (bias)
        for (int64_t i = 0; i < count; ++i) out[i] = weight[i] * (out[i] * factor) + bias[i];
    else
        for (int64_t i = 0; i < count; ++i) out[i] = weight[i] * (out[i] * factor);
}

template <class V>
void add_to(float* x, const float* y, const float* bias, float factor, int64_t count) {
    if (bias)
        for (int64_t i = 0; i < count; ++i) x[i] += factor * (y[i] + bias[i]);
    else
        for (int64_t i = 0; i < count; ++i) x[i] += factor * y[i];
}

template <class V>
void rope(float* x, const float* cos, const float* sin, int64_t dim, bool interleaved) {
    const int64_t half = dim / 2;
    if (interleaved) {
        for (int64_t i = 0; i < dim; i += 2) {
            const float a = x[i], b = x[i + 1];
            x[i] = a * cos[i] - b * sin[i];
            x[i + 1] = b * cos[i + 1] + a * sin[i + 1];
        }
        return;
    }
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

struct Silu {
    static BITMILL_INLINE float of(float x) { return x / (1.0f + exponential(-x)); }
};

struct GeluTanh {  // (1 + tanh(y)) / 2 is the logistic function of 2 y
    static BITMILL_INLINE float of(float x) {
        return x / (1.0f + exponential(-1.5957691216f * (x + 0.044715f * x * x * x)));
    }
};

struct GeluErf {  // erfc of |x| / sqrt(2) within 1.2e-7 of itself: the Chebyshev fit of Numerical Recipes
    static BITMILL_INLINE float of(float x) {
        const float z = std::fabs(x) * 0.70710678f, t = 1.0f / (1.0f + 0.5f * z);
        float power = 0.17087277f;
        power = power * t - 0.82215223f;
        power = power * t + 1.48851587f;
        power = power * t - 1.13520398f;
        power = power * t + 0.27886807f;
        power = power * t - 0.18628806f;
        power = power * t + 0.09678418f;
        power = power * t + 0.37409196f;
        power = power * t + 1.00002368f;
        power = power * t - 1.26551223f;
        const float tail = 0.5f * t * exponential(power - z * z);
        return x * (x < 0.0f ? tail : 1.0f - tail);
    }
};

struct Relu {
    static BITMILL_INLINE float of(float x) { return x < 0.0f ? 0.0f : x; }
};

template <class V, class Act>
void activate(const float* gate, const float* gate_bias, const float* up, const float* up_bias, int64_t count, float* out) {
    if (!gate_bias && !up_bias && up) {
        for (int64_t i = 0; i < count; ++i) out[i] = Act::of(gate[i]) * up[i];
        return;
    }
    if (!up) {
        for (int64_t i = 0; i < count; ++i) out[i] = Act::of(gate[i] + (gate_bias ? gate_bias[i] : 0.0f));
        return;
    }
    for (int64_t i = 0; i < count; ++i)
        out[i] = Act::of(gate[i] + (gate_bias ? gate_bias[i] : 0.0f)) * (up[i] + (up_bias ? up_bias[i] : 0.0f));
}

// Eigen's quotient of polynomials, within a few units in the last place.
BITMILL_INLINE float hyperbolic_tangent(float x) {
    x = x < -7.9f ? -7.9f : x;
    x = x > 7.9f ? 7.9f : x;
    const float s = x * x;
    float above = -2.76076847742355e-16f, below = 1.19825839466702e-06f;
    for (const float next : {2.00018790482477e-13f, -8.60467152213735e-11f, 5.12229709037114e-08f, 1.48572235717979e-05f,
                             6.37261928875436e-04f, 4.89352455891786e-03f})
        above = above * s + next;
    for (const float next : {1.18534705686654e-04f, 2.26843463243900e-03f, 4.89352518554385e-03f}) below = below * s + next;
    return x * above / below;
}

template <class V>
void cap_at(float* x, float most, int64_t count) {
    const float inverse = 1.0f / most;
    for (int64_t i = 0; i < count; ++i) x[i] = most * hyperbolic_tangent(x[i] * inverse);
}

// Weights of a head: exp(score - largest), whose sum is returned.
template <class V>
BITMILL_INLINE float soften(float* scores, int64_t length) {
    float most = scores[0];
    for (int64_t i = 1; i < length; ++i) most = scores[i] > most ? scores[i] : most;
    for (int64_t i = 0; i < length; ++i) scores[i] = exponential(scores[i] - most);
    return total<V>(scores, length);
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
            float cap, float* scores, float* out) {
    for (int64_t p = 0; p < length; ++p)
        for (int64_t h = 0; h < heads; ++h) scores[h * length + p] = scaling * dot<V>(q + h * dim, keys + p * dim, dim);
    if (cap > 0) cap_at<V>(scores, cap, heads * length);
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

template <class V>
void softmax(float* scores, int64_t length) {
    const float factor = 1.0f / soften<V>(scores, length);
    for (int64_t i = 0; i < length; ++i) scores[i] *= factor;
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
void add_fp16_rows(const uint16_t* weights, int64_t columns, const float* x, float* y, int64_t first, int64_t last) {
    const int64_t whole = columns / 16 * 16;
    float end[16] = {};
    uint16_t row_end[16] = {};
    std::memcpy(end, x + whole, (columns - whole) * sizeof(float));
    for (int64_t r = first; r < last; ++r) {
        const uint16_t* row = weights + r * columns;
        std::memcpy(row_end, row + whole, (columns - whole) * sizeof(uint16_t));
        typename V::Floats sums = V::mul(V::template rows<16>(row_end), V::template rows<16>(end));
        for (int64_t i = 0; i < whole; i += 16)
            sums = V::fma(V::template rows<16>(row + i), V::template rows<16>(x + i), sums);
        y[r] += V::sum(sums);
    }
}

template <class V>
void transposed_rows(const float* weights, int64_t rows, int64_t columns, const float* x, float* y, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) y[r] = 0;
    for (int64_t c = 0; c < columns; ++c) {
        const float* column = weights + c * rows;
        const float by = x[c];
        for (int64_t r = first; r < last; ++r) y[r] += by * column[r];
    }
}

template <class V>
constexpr StepKernels step_kernels = {
    rms_norm<V>, layer_norm<V>, add_to<V>, rope<V>,
    {activate<V, Silu>, activate<V, GeluTanh>, activate<V, GeluErf>, activate<V, Relu>},  // in the order of Activation
    cap_at<V>, attend<V>, softmax<V>, multiply_tiles<V>, to_fp16<V>, dense_rows<V>, dense_bf16_rows<V>, add_fp16_rows<V>, transposed_rows<V>};

}  // namespace bitmill
