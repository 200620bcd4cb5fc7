#include "fixed.h"

#include <algorithm>

#include "../isa.h"
#include "../threads.h"

namespace bitmill {

FixedShape fixed_shape(int64_t columns) {
    const int64_t padded = (columns + 63) / 64 * 64;
    return {columns, 64, 64, padded, 64, fixed_reach};
}

FixedShape fixed_shape(int64_t columns, int64_t group, int64_t stored, int64_t padded) {
    int64_t span = 64;
    while (stored % span || padded % span) span /= 2;
    return {columns, group, stored, padded, span, fixed_reach_of_bytes};
}

void fixed_inputs(const FixedShape& shape, const float* x, int64_t tokens, FixedInputs& out, int threads) {
    out.shape = shape, out.tokens = tokens;
    out.integers.resize(tokens * shape.padded), out.steps.resize(tokens * shape.spans()), out.sums.resize(tokens * shape.groups());
    parallel_for(tokens, threads, [&](int64_t first, int64_t last) {
        thread_local std::vector<float> spare;
        spare.resize(shape.padded);
        for (int64_t t = first; t < last; ++t)
            isa().fixed->inputs(shape, x + t * shape.columns, spare.data(), out.integers.data() + t * shape.padded,
                                out.steps.data() + t * shape.spans(), out.sums.data() + t * shape.groups());
    });
}

void fixed_product(const FixedInputs& x, const float* W, int64_t rows, float* y, int64_t stride, int threads) {
    const FixedKernels& best = *isa().fixed;
    parallel_for((rows + fixed_rows - 1) / fixed_rows, threads, [&](int64_t first, int64_t last) {
        thread_local FixedPanel panel;
        for (int64_t i = first; i < last; ++i) {
            const int64_t row = i * fixed_rows, count = std::min(fixed_rows, rows - row);
            best.panel(x.shape, W + row * x.shape.columns, count, panel);
            best.product(x, panel, count, y + row, stride);
        }
    });
}

}  // namespace bitmill
