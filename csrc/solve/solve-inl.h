// The kernels of solve.h, compiled for an instruction set V.
#pragma once
#include <cmath>

#include "../simd/inline.h"
#include "solve.h"

namespace bitmill {

constexpr int64_t solve_tile = 64;  // rows that go through all columns together, in the first-level cache

// The nearest level of each of `count` values from row `first` on; between two levels that are as near, the lower one.
BITMILL_INLINE void round_tile(const Columns& c, int64_t column, int64_t first, int64_t count, const float* x,
                               float* value, int32_t* code) {
    const int64_t group = c.group[column];
    const float* table = c.table + group * c.levels * c.rows + first;
    const float* middles = c.middles + group * (c.levels - 1) * c.rows + first;
    const uint8_t* codes = c.codes + group * c.levels * c.rows + first;
    for (int64_t i = 0; i < count; ++i) {
        value[i] = table[i];
        code[i] = codes[i];
    }
    for (int k = 1; k < c.levels; ++k) {
        const float *middle = middles + (k - 1) * c.rows, *level = table + k * c.rows;
        const uint8_t* own = codes + k * c.rows;
        for (int64_t i = 0; i < count; ++i) {
            const bool above = x[i] > middle[i];
            value[i] = above ? level[i] : value[i];
            code[i] = above ? own[i] : code[i];
        }
    }
}

template <class V>
void feedback_with(const Columns& c, const Feedback& f, int64_t first, int64_t last) {
    float value[solve_tile], error[solve_tile];
    int32_t code[solve_tile];
    for (int64_t row = first; row < last; row += solve_tile) {
        const int64_t count = last - row < solve_tile ? last - row : solve_tile;
        for (int64_t k = 0; k < c.count; ++k) {
            float* w = f.W + k * c.rows + row;
            round_tile(c, k, row, count, w, value, code);
            const float* u = f.U + k * f.stride;
            for (int64_t i = 0; i < count; ++i) {
                error[i] = (w[i] - value[i]) / u[k];
                w[i] = value[i];
                f.errors[k * c.rows + row + i] = error[i];
                f.codes[k * c.rows + row + i] = static_cast<uint8_t>(code[i]);
            }
            for (int64_t l = k + 1; l < c.count; ++l) {
                float* later = f.W + l * c.rows + row;
                for (int64_t i = 0; i < count; ++i) later[i] -= u[l] * error[i];
            }
        }
    }
}

template <class V>
void descend_with(const Columns& c, const Descend& d, int64_t first, int64_t last) {
    float target[solve_tile], value[solve_tile], moved[solve_tile];
    int32_t code[solve_tile];
    for (int64_t row = first; row < last; row += solve_tile) {
        const int64_t count = last - row < solve_tile ? last - row : solve_tile;
        for (int64_t k = 0; k < c.count; ++k) {
            const float *h = d.H + k * c.count, *gradient = d.gradient + k * c.rows + row;
            float* q = d.Q + d.place[k] * c.rows + row;
            uint8_t* codes = d.codes + d.place[k] * c.rows + row;
            for (int64_t i = 0; i < count; ++i) target[i] = q[i] + gradient[i] / h[k];
            round_tile(c, k, row, count, target, value, code);
            for (int64_t i = 0; i < count; ++i) {
                moved[i] = value[i] - q[i];
                q[i] = value[i];
                codes[i] = static_cast<uint8_t>(code[i]);
                d.moved[k * c.rows + row + i] = moved[i];
            }
            for (int64_t l = k + 1; l < c.count; ++l) {
                float* later = d.gradient + l * c.rows + row;
                for (int64_t i = 0; i < count; ++i) later[i] -= h[l] * moved[i];
            }
        }
    }
}

template <class V>
void codings_with(const Codings& c, int64_t first, int64_t last) {
    constexpr int most_bins = 512, most_codings = 64;
    float mass[most_bins], moment[most_bins], cost[most_codings];
    const float half = static_cast<float>(c.bins / 4), top = static_cast<float>(c.bins - 1);
    for (int64_t n = first; n < last; ++n) {
        const float *x = c.x + n * c.width, *weight = c.weight + n % c.weights * c.width;
        const float divisor = c.factor[n] > 0 ? c.factor[n] : 1.0f;
        for (int b = 0; b < c.bins; ++b) mass[b] = moment[b] = 0;
        for (int64_t i = 0; i < c.width; ++i) {
            const float value = x[i] / divisor, at = std::floor((value + half) * 2) + 1;
            const int bin = static_cast<int>(at > 0 ? at < top ? at : top : 0.0f);
            mass[bin] += weight[i];
            moment[bin] += weight[i] * value;
        }
        for (int k = 0; k < c.codings; ++k) cost[k] = 0;
        for (int b = 0; b < c.bins; ++b) {
            if (mass[b] == 0 && moment[b] == 0) continue;
            const float *square = c.costs + b * c.codings, *product = c.costs + (c.bins + b) * c.codings;
            for (int k = 0; k < c.codings; ++k) cost[k] += mass[b] * square[k] + moment[b] * product[k];
        }
        int best = 0;
        for (int k = 1; k < c.codings; ++k)
            if (cost[k] < cost[best]) best = k;
        c.least[n] = cost[best] * (c.factor[n] * c.factor[n]);
        c.coding[n] = best;
    }
}

template <class V>
constexpr SolveKernels solve_kernels = {feedback_with<V>, descend_with<V>, codings_with<V>};

}  // namespace bitmill
