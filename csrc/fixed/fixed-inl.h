// The kernels of fixed.h for an instruction set V, whose V::Pairs multiplies integers of 16 bits and V::Quads those of 8.
#pragma once
#include <cstring>
#include <type_traits>
#include <utility>

#include "../simd/inline.h"
#include "../simd/round.h"
#include "fixed.h"

namespace bitmill {

template <int span, class Number>
BITMILL_INLINE void fixed_integers(const float* x, const Step& units, Number* out) {
    if (units.per_unit > 0)
        for (int i = 0; i < span; ++i) out[i] = static_cast<Number>(static_cast<int32_t>(x[i] * units.per_unit + rounding - rounding));
    else std::memset(out, 0, span * sizeof(Number));
}

// A span of a token: `count` columns from `first` on, of the group that starts `within` columns before; the rest is padding.
struct FixedPlace {
    int64_t within, first, count;
};

// Reads tokens' spans one after the other, and returns their steps.
template <int span>
struct FixedRounding {
    const FixedShape& shape;
    const float* x;
    Step units[16];

    template <class Number>
    BITMILL_INLINE float operator()(int64_t token, const FixedPlace& at, Number* out) {
        const float* from = x + token * shape.columns + at.first;
        if ((shape.step < shape.group ? at.within : at.first) % shape.step == 0) {
            const int64_t left = shape.columns - at.first, part = shape.group - at.within;
            const int64_t most = shape.step < shape.group && part < shape.step ? part : shape.step;
            units[token] = most == span && left >= span ? step_of(from, span, shape.reach)
                                                        : step_of(from, most < left ? most : left, shape.reach);
        }
        float padded[span] = {};
        if (at.count < span) std::memcpy(padded, from, at.count * sizeof(float)), from = padded;
        fixed_integers<span>(from, units[token], out);
        return units[token].size;
    }
};

struct FixedCodes {
    const FixedShape& shape;
    const FixedSource& source;

    template <class Number>
    BITMILL_INLINE float operator()(int64_t token, const FixedPlace& at, Number* out) const {
        const int8_t* from = source.integers + token * shape.columns + at.first;
        for (int64_t i = 0; i < at.count; ++i) out[i] = from[i];
        std::memset(out + at.count, 0, (shape.span - at.count) * sizeof(Number));
        return source.steps[token * source.row_steps + at.first / shape.step];
    }
};

template <int span, class Number, class Read>
BITMILL_INLINE void fixed_spans(const FixedShape& shape, int64_t tokens, Read read, uint8_t* integers, float* steps, int32_t* wholes,
                                float* sums) {
    constexpr int each = 4 / sizeof(Number);
    for (int64_t g = 0, left = shape.spans(); g < shape.groups(); ++g, sums += tokens) {
        for (int64_t t = 0; t < tokens; ++t) sums[t] = 0;
        for (int64_t within = 0; within < shape.stored && left > 0; within += span, --left) {
            const int64_t first = g * shape.group + within, whole = within + span < shape.group ? span : shape.group - within;
            const FixedPlace at{within, first, first + whole < shape.columns ? whole : shape.columns - first};
            for (int64_t t = 0; t < tokens; ++t) {
                Number found[span];
                int32_t sum = 0;
                float step = 0;
                if (at.count > 0) step = read(t, at, found);
                else std::memset(found, 0, sizeof found);
                for (int i = 0; i < span; ++i) sum += found[i];
                for (int i = 0; i < span / each; ++i) std::memcpy(integers + 4 * (i * tokens + t), found + each * i, 4);
                sums[t] += step * static_cast<float>(sum);
                *steps++ = step, *wholes++ = sum;
            }
            integers += tokens * span * sizeof(Number);
        }
    }
}

template <class V, int span, class Number>  // V: so that no copy of another instruction set stands in for this one
void fixed_tile(const FixedSource& from, int64_t tile, FixedInputs& out) {
    const FixedShape& s = out.shape;
    const int64_t first = out.first(tile), tokens = out.first(tile + 1) - first;
    const auto fill = [&](auto read) {
        fixed_spans<span, Number>(s, tokens, read, out.integers.data() + first * s.row_bytes(), out.steps.data() + first * s.spans(),
                                  out.wholes.data() + first * s.spans(), out.sums.data() + first * s.groups());
    };
    if (from.x) return fill(FixedRounding<span>{s, from.x + first * s.columns, {}});
    const FixedSource rest{nullptr, from.integers + first * s.columns, from.steps + first * from.row_steps, from.row_steps};
    fill(FixedCodes{s, rest});
}

template <class V, int span = 64>
void fixed_inputs_of(const FixedSource& from, int64_t tile, FixedInputs& out) {
    if constexpr (span > 16) {
        if (out.shape.span < span) return fixed_inputs_of<V, span / 2>(from, tile, out);
    }
    out.shape.bytes == 1 ? fixed_tile<V, span, int8_t>(from, tile, out) : fixed_tile<V, span, int16_t>(from, tile, out);
}

// Of floats, whose groups and spans are 64 columns.
template <class V>
void fixed_panel(const FixedShape& shape, const float* W, int64_t count, FixedPanel& out) {
    constexpr int span = 64;
    out.resize(shape.row_bytes(), shape.groups()), out.offsets.clear();
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
            const Step units = step_of(from, span, shape.reach);
            fixed_integers<span>(from, units, found[r]);
            out.steps[c / span * fixed_rows + r] = units.size;
        }
        uint8_t* to = out.integers.data() + 2 * c * fixed_rows;  // pair by pair: rows one by one would take twice as long
        for (int64_t i = 0; i < span; i += 2)
            for (int64_t r = 0; r < fixed_rows; ++r, to += 4) std::memcpy(to, found[r] + i, 4);
    }
}

// Where a span of T tokens and 16 rows starts, in words of four bytes.
struct FixedSpan {
    const uint8_t *x, *w;
    const float *steps, *sizes;
    const int32_t* wholes;
    const float *sums, *offsets;  // where the group ends, else null
};

// One span, added to `total` (T, 16). A function of its own, in which compilers keep the sums in registers.
template <class P, int T>
BITMILL_NOINLINE void fixed_span(const FixedSpan& span, int64_t words, int32_t bias, float* total) {
    constexpr int parts = fixed_rows / P::rows;
    const FixedSpan at = span;  // which no store can change
    typename P::Part sums[parts][T];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t)
        for (int i = 0; i < parts; ++i) {
            if constexpr (P::biased) sums[i][t] = P::all(bias * at.wholes[t]);
            else sums[i][t] = P::none();
        }
    const uint8_t *x = at.x, *w = at.w;
    for (; words > 0; words -= 2, w += 128, x += 8 * T)
#pragma GCC unroll 2
        for (int u = 0; u < 2; u += P::words) {
            typename P::Part each[parts][P::words];
            for (int i = 0; i < parts; ++i)
                for (int d = 0; d < P::words; ++d) each[i][d] = P::load(w + 64 * (u + d) + 4 * P::rows * i);
#pragma GCC unroll 16
            for (int t = 0; t < T; ++t) {
                typename P::Part four[P::words];
                for (int d = 0; d < P::words; ++d) four[d] = P::spread(x + 4 * (T * (u + d) + t));
                for (int i = 0; i < parts; ++i) sums[i][t] = P::dot(sums[i][t], each[i], four);
            }
        }
    for (int i = 0; i < parts; ++i) {
        const auto size = P::reals(at.sizes + P::rows * i);
        const auto offset = P::reals((at.offsets ? at.offsets : at.sizes) + P::rows * i);
        float* to = total + P::rows * i;
        if (at.offsets)
#pragma GCC unroll 16
            for (int t = 0; t < T; ++t, to += fixed_rows)
                P::store(to, P::subtract(P::add(P::reals(to), sums[i][t], size, at.steps[t]), offset, at.sums[t]));
        else
#pragma GCC unroll 16
            for (int t = 0; t < T; ++t, to += fixed_rows) P::store(to, P::add(P::reals(to), sums[i][t], size, at.steps[t]));
    }
}

// A tile of T tokens, from `first` on.
template <class P, int T>
void fixed_tokens(const FixedInputs& x, int64_t first, const FixedPanel& panel, int64_t count, float* y, int64_t stride) {
    const FixedShape& shape = x.shape;
    const int64_t spans = shape.spans(), groups = shape.groups(), in_group = shape.stored / shape.span;
    const int64_t words = shape.span * shape.bytes / 4;
    FixedSpan at{x.integers.data() + first * shape.row_bytes(), panel.integers.data(), x.steps.data() + first * spans,
                 panel.steps.data(), x.wholes.data() + first * spans, nullptr, nullptr};
    alignas(64) float total[T * fixed_rows] = {};
    for (int t = 0; t < T; ++t)  // rows of y have a large stride: prefetch them before the stores
        for (const int64_t to : {int64_t{0}, count - 1}) __builtin_prefetch(y + (first + t) * stride + to, 1);
    for (int64_t g = 0, left = spans; g < groups; ++g, at.sizes += fixed_rows) {
        at.offsets = nullptr;
        for (int64_t s = in_group < left ? in_group : left; s > 0; --s, --left) {
            if (s == 1 && !panel.offsets.empty())
                at.offsets = panel.offsets.data() + g * fixed_rows, at.sums = x.sums.data() + first * groups + g * T;
            fixed_span<P, T>(at, words, panel.bias, total);
            at.x += 4 * T * words, at.w += 64 * words, at.steps += T, at.wholes += T;
        }
    }
    for (int t = 0; t < T; ++t) std::memcpy(y + (first + t) * stride, total + fixed_rows * t, count * sizeof(float));
}

template <class P, int T>
void fixed_product_of(int64_t tokens, const FixedInputs& x, int64_t first, const FixedPanel& panel, int64_t count, float* y,
                      int64_t stride) {
    if (tokens == T) return fixed_tokens<P, T>(x, first, panel, count, y, stride);
    if constexpr (T > 1) fixed_product_of<P, T - 1>(tokens, x, first, panel, count, y, stride);
}

template <class V>
void fixed_products(const FixedInputs& x, int64_t tile, const FixedPanel& panel, int64_t count, float* y, int64_t stride) {
    const int64_t first = x.first(tile), tokens = x.first(tile + 1) - first;
    constexpr int T = V::fixed_tokens;
    const auto product = x.shape.bytes == 1 ? fixed_product_of<typename V::Quads, T> : fixed_product_of<typename V::Pairs, T>;
    product(tokens, x, first, panel, count, y, stride);
}

template <class V>
int64_t fixed_peak(int64_t rounds) {
    using P = typename V::Quads;
    constexpr int chains = 12;  // more than the latency of a product
    typename P::Part sums[chains], each[P::words], four[P::words];
    uint8_t numbers[64 * P::words];
    std::memset(numbers, 1, sizeof numbers);
    for (auto& sum : sums) sum = P::none();
    for (int d = 0; d < P::words; ++d) each[d] = P::load(numbers), four[d] = P::spread(numbers);
    for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 16
        for (int j = 0; j < chains; ++j) {
#if defined(__AVX2__)  // unknown to compilers: the part of a product that is alike in all rounds would be computed once
            if constexpr (P::words > 1) asm("" : "+x"(each[0]), "+x"(each[1]));
#endif
            sums[j] = P::dot(sums[j], each, four);
        }
    }
    float total[fixed_rows] = {};
    for (const auto& sum : sums) P::store(total, P::add(P::reals(total), sum, P::reals(total), 1.0f));
    return rounds * chains * P::words * P::rows * 4 + (total[0] > 0);  // so that no product is left out
}

template <class V>
constexpr FixedKernels fixed_kernels = {V::fixed_tokens, V::Quads::largest, fixed_inputs_of<V>, fixed_panel<V>, fixed_products<V>,
                                        fixed_peak<V>};

}  // namespace bitmill
