// The kernels of fixed.h for an instruction set V.
#pragma once
#include <cstring>

#include "../simd/inline.h"
#include "../simd/round.h"
#include "fixed.h"

namespace bitmill {

// The integers of a span; returns their step.
template <int span>
BITMILL_INLINE float fixed_integers(const float* x, float reach, int16_t* out) {
    const Step units = step_of(x, span, reach);
    if (units.per_unit > 0)
        for (int i = 0; i < span; ++i) out[i] = static_cast<int16_t>(static_cast<int32_t>(x[i] * units.per_unit + rounding - rounding));
    else std::memset(out, 0, span * sizeof(int16_t));
    return units.size;
}

template <int span>
BITMILL_INLINE void fixed_spans(const FixedShape& shape, const float* x, int16_t* integers, float* steps, float* sums) {
    for (int64_t g = 0, left = shape.spans(); g < shape.groups(); ++g) {
        sums[g] = 0;
        for (int64_t s = shape.stored / span; s > 0 && left > 0; --s, --left, x += span, integers += span) {
            *steps = fixed_integers<span>(x, shape.reach, integers);
            int32_t sum = 0;
            for (int i = 0; i < span; ++i) sum += integers[i];
            sums[g] += *steps++ * static_cast<float>(sum);
        }
    }
}

template <class V>
void fixed_token(const FixedShape& shape, const float* x, float* spare, int16_t* integers, float* steps, float* sums) {
    if (shape.padded != shape.columns) {
        std::memset(spare, 0, shape.padded * sizeof(float));
        for (int64_t g = 0; g * shape.group < shape.columns; ++g) {
            const int64_t first = g * shape.group, left = shape.columns - first, count = left < shape.group ? left : shape.group;
            std::memcpy(spare + g * shape.stored, x + first, count * sizeof(float));
        }
        x = spare;
    }
    if (shape.span == 64) fixed_spans<64>(shape, x, integers, steps, sums);
    else if (shape.span == 32) fixed_spans<32>(shape, x, integers, steps, sums);
    else fixed_spans<16>(shape, x, integers, steps, sums);
}

// Of floats, whose groups and spans are 64 columns.
template <class V>
void fixed_panel(const FixedShape& shape, const float* W, int64_t count, FixedPanel& out) {
    constexpr int span = 64;
    out.integers.resize(fixed_rows * shape.padded), out.steps.resize(fixed_rows * shape.groups()), out.offsets.clear();
    for (int64_t c = 0; c < shape.padded; c += span) {
        int16_t found[fixed_rows][span];
        for (int64_t r = 0; r < fixed_rows; ++r) {
            const int64_t left = r < count ? shape.columns - c : 0;
            const float* from = W + r * shape.columns + c;
            float padded[span];
            if (left < span) {
                std::memset(padded, 0, sizeof padded);
                std::memcpy(padded, from, left * sizeof(float));
                from = padded;
            }
            out.steps[c / span * fixed_rows + r] = fixed_integers<span>(from, shape.reach, found[r]);
        }
        int16_t* to = out.integers.data() + c * fixed_rows;  // pair by pair: rows one by one would take twice as long
        for (int64_t i = 0; i < span; i += 2)
            for (int64_t r = 0; r < fixed_rows; ++r, to += 2) std::memcpy(to, found[r] + i, 2 * sizeof(int16_t));
    }
}

// One span of T tokens, added to `total` (T, 16). A function of its own, in which compilers keep the sums in registers.
template <class V, int T>
BITMILL_NOINLINE void fixed_span(const int8_t* x, int64_t width, const uint8_t* w, int64_t pairs, const float* size, const float* steps,
                              int64_t spans, float* total) {
    using P = typename V::Pairs;
    constexpr int parts = fixed_rows / P::rows;
    typename P::Part sums[parts][T];
    for (int t = 0; t < T; ++t)
        for (int i = 0; i < parts; ++i) sums[i][t] = P::none();
    for (; pairs > 0; pairs -= 2, w += 128, x += 8)
#pragma GCC unroll 2
        for (int u = 0; u < 2; ++u) {
            typename P::Part both[parts];
            for (int i = 0; i < parts; ++i) both[i] = P::load(w + 64 * u + 4 * P::rows * i);
#pragma GCC unroll 16
            for (int t = 0; t < T; ++t) {
                const auto each = P::spread(x + 4 * u + t * width);
                for (int i = 0; i < parts; ++i) sums[i][t] = P::dot(sums[i][t], both[i], each);
            }
        }
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t)
        for (int i = 0; i < parts; ++i)
            P::add(total + fixed_rows * t + P::rows * i, sums[i][t], size + P::rows * i, steps[t * spans]);
}

// T tokens from `first` on, as many as have their sums in registers.
template <class V, int T>
void fixed_tokens(const FixedInputs& x, const FixedPanel& panel, int64_t first, int64_t count, float* y, int64_t stride) {
    const FixedShape& shape = x.shape;
    const int64_t spans = shape.spans(), groups = shape.groups(), in_group = shape.stored / shape.span;
    const int16_t *integers = x.integers.data() + first * shape.padded, *w = panel.integers.data();
    alignas(64) float total[T * fixed_rows] = {};
    for (int t = 0; t < T; ++t)  // rows of y have a large stride: prefetch them before the stores
        for (const int64_t at : {int64_t{0}, count - 1}) __builtin_prefetch(y + (first + t) * stride + at, 1);
    for (int64_t g = 0, s = 0; g < groups; ++g) {
        for (const int64_t stop = s + in_group < spans ? s + in_group : spans; s < stop; ++s) {
            fixed_span<V, T>(reinterpret_cast<const int8_t*>(integers), 2 * shape.padded, reinterpret_cast<const uint8_t*>(w),
                             shape.span / 2, panel.steps.data() + g * fixed_rows, x.steps.data() + first * spans + s, spans, total);
            integers += shape.span, w += shape.span * fixed_rows;
        }
        if (panel.offsets.empty()) continue;
        const auto offset = V::template rows<16>(panel.offsets.data() + g * fixed_rows);
        for (int t = 0; t < T; ++t) {
            const auto sum = V::all(x.sums[(first + t) * groups + g]);
            V::store(total + fixed_rows * t, V::fnma(offset, sum, V::template rows<16>(total + fixed_rows * t)));
        }
    }
    for (int t = 0; t < T; ++t) std::memcpy(y + (first + t) * stride, total + fixed_rows * t, count * sizeof(float));
}

template <class V>
void fixed_products(const FixedInputs& x, const FixedPanel& panel, int64_t count, float* y, int64_t stride) {
    int64_t t = 0;
    for (; t + V::fixed_tokens <= x.tokens; t += V::fixed_tokens) fixed_tokens<V, V::fixed_tokens>(x, panel, t, count, y, stride);
    for (; t + 2 <= x.tokens; t += 2) fixed_tokens<V, 2>(x, panel, t, count, y, stride);
    if (t < x.tokens) fixed_tokens<V, 1>(x, panel, t, count, y, stride);
}

template <class V>
constexpr FixedKernels fixed_kernels = {fixed_token<V>, fixed_panel<V>, fixed_products<V>};

}  // namespace bitmill
