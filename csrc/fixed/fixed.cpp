#include "fixed.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "panels.h"

namespace bitmill {

FixedShape fixed_shape(int64_t columns) {
    const int64_t padded = (columns + 63) / 64 * 64;
    return {columns, 64, 64, padded, 64, 64, fixed_reach, 2};
}

FixedShape fixed_shape(int64_t columns, int64_t group, int64_t stored, int64_t padded, int64_t step, float reach, int bytes) {
    int64_t span = 64;
    const bool parts = 0 < step && step < group && step < columns;  // of a group
    while (stored % span || padded % span || (parts && step % span)) span /= 2;
    if (step == 0) step = std::min(span, group);
    else if (step >= columns) step = (columns + group - 1) / group * group;
    else if (step % group && ((group < columns && group % step) || span < 16))
        throw std::invalid_argument("a step of the inputs has other columns than groups or parts of one, of 16 columns at least");
    return {columns, group, stored, padded, span, step, reach, bytes};
}

void fixed_inputs(const FixedShape& shape, const FixedSource& x, int64_t tokens, FixedInputs& out, int threads) {
    const FixedKernels& best = *isa().fixed;
    out.shape = shape, out.tokens = tokens, out.tiles = (tokens + best.tokens - 1) / best.tokens;
    out.integers.resize(tokens * shape.row_bytes()), out.sums.resize(tokens * shape.groups());
    out.steps.resize(tokens * shape.spans()), out.wholes.resize(tokens * shape.spans());
    parallel_for(out.tiles, threads, [&](int64_t first, int64_t last) {
        for (; first < last; ++first) best.inputs(x, first, out);
    });
}

int64_t fixed_peak(int64_t rounds, int threads) {
    std::atomic<int64_t> total{0};
    parallel_for(threads, threads, [&](int64_t, int64_t) { total += isa().fixed->peak(rounds); });
    return total;
}

void fixed_product(const FixedInputs& x, const float* W, int64_t rows, float* y, int64_t stride, int threads) {
    fixed_panels(x, rows, y, stride, threads, [&](int64_t i, FixedPanel& panel) {
        const int64_t row = i * fixed_rows;
        isa().fixed->panel(x.shape, W + row * x.shape.columns, std::min(fixed_rows, rows - row), panel);
    });
}

}  // namespace bitmill
