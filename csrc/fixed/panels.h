// The loop over panels and tiles of tokens. Panels that fit into a core's second-level cache together take turns with one
// tile of tokens after the other: a panel of 5632 columns does not fit into the first-level cache, nor all tokens into the second.
#pragma once
#include <algorithm>

#include "../isa.h"
#include "../threads.h"
#include "fixed.h"

namespace bitmill {

constexpr int64_t cached_bytes = 256 << 10;

// y (tokens, stride) from x and all rows of W, of which read(number, panel) unpacks a panel.
template <class Read>
void fixed_panels(const FixedInputs& x, int64_t rows, float* y, int64_t stride, int threads, const Read& read) {
    const FixedKernels& best = *isa().fixed;
    const int64_t share = std::max<int64_t>(1, cached_bytes / (fixed_rows * x.shape.row_bytes()));
    parallel_for((rows + fixed_rows - 1) / fixed_rows, threads, [&](int64_t first, int64_t last) {
        thread_local std::vector<FixedPanel> panels;  // kept: memory that is new is slow
        if (static_cast<int64_t>(panels.size()) < share) panels.resize(share);
        for (int64_t next; first < last; first = next) {
            next = std::min(last, first + share);
            for (int64_t i = first; i < next; ++i) read(i, panels[i - first]);
            for (int64_t tile = 0; tile < x.tiles; ++tile)
                for (int64_t i = first; i < next; ++i) {
                    const int64_t row = i * fixed_rows, count = std::min(fixed_rows, rows - row);
                    best.product(x, tile, panels[i - first], count, y + row, stride);
                }
        }
    });
}

}  // namespace bitmill
