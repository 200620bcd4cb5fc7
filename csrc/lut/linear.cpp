#include "linear.h"

#include <atomic>
#include <cstring>
#include <stdexcept>

#include "../fixed/panels.h"

namespace bitmill {
namespace {

// A bound of the entries of the tables.
int largest_entry(const Weights& w) {
    if (w.source == Source::own) return 255;
    return w.source == Source::bank ? 63 : *std::max_element(w.tables, w.tables + (int64_t{1} << w.layout.bits));
}

Kernel kernel_of(const Weights& weights, Act act) {
    const LookupKernels& best = *isa().lookup;
    return act == Act::float32 ? best.floats(weights) : best.choose(weights, act, 1);
}

// y (tokens, rows) of inputs that are read.
void product(const Weights& weights, const Inputs& inputs, int64_t tokens, Act act, float* y, int threads) {
    const Layout& layout = weights.layout;
    const Kernel one = kernel_of(weights, act);
    const Kernel four = act == Act::float32 ? nullptr : isa().lookup->choose(weights, act, 4);
    const auto from = [&](int64_t t) {
        Inputs rest = inputs;
        rest.bytes += t * inputs.columns, rest.lows += t * inputs.columns;
        rest.steps += t * inputs.step_count, rest.sums += t * inputs.groups, rest.floats += t * inputs.columns;
        return rest;
    };
    // Codes that all tokens visit before the next ones are read stay in a core's second-level cache.
    const int64_t share = tokens > 1 ? std::max<int64_t>(1, cached_bytes / layout.tile_bytes()) : layout.tiles();
    parallel_for(layout.tiles(), threads, [&](int64_t first, int64_t last) {
        for (int64_t next; first < last; first = next) {
            next = std::min(last, first + share);
            for (int64_t t = 0; t < tokens;) {
                const bool many = four && t + 4 <= tokens;
                (many ? four : one)(weights, from(t), y + t * layout.rows, layout.rows, first, next);
                t += many ? 4 : 1;
            }
        }
    });
}

}  // namespace

uint64_t read_all(const uint8_t* bytes, int64_t count, int threads) {
    std::atomic<uint64_t> total{0};
    parallel_for(count / 64, threads, [&](int64_t first, int64_t last) {
        uint64_t sums[8] = {};
        for (int64_t line = first; line < last; ++line) {
            uint64_t words[8];
            std::memcpy(words, bytes + 64 * line, 64);
            for (int i = 0; i < 8; ++i) sums[i] += words[i];
        }
        for (const uint64_t sum : sums) total += sum;
    });
    return total;
}

void linear(const Weights& weights, const float* x, int64_t tokens, Act act, float* y, int threads) {
    if (!kernel_of(weights, act)) throw std::invalid_argument("no kernel for these weights");
    thread_local Buffers buffers;
    isa().read_inputs(weights.layout, x, tokens, act, buffers);
    product(weights, buffers.inputs, tokens, act, y, threads);
}

bool needs_wide_grid(const Weights& weights) { return !kernel_of(weights, Act::int8); }

bool has_grid_linear(const Weights& weights, const Grid& grid) {
    return has_grid(weights.layout, grid) && kernel_of(weights, Act::int16);
}

void grid_linear(const Weights& weights, const Grid& grid, const float* x, int64_t tokens, float* y, int threads) {
    thread_local Buffers buffers;
    const Act act = read_grid(weights.layout, grid, x, tokens, needs_wide_grid(weights), buffers);
    product(weights, buffers.inputs, tokens, act, y, threads);
    const auto& kept = buffers.kept;  // of this thread, for all
    if (kept.empty()) return;
    parallel_for(weights.layout.tiles(), threads, [&](int64_t first, int64_t last) {
        add_columns(weights, act, kept, x, tokens, y, first, last);
    });
}

bool has_gemm(const Weights& weights) { return isa().lookup->panel(weights) != nullptr; }

void linear_gemm(const Weights& weights, const FixedSource& x, int64_t tokens, Act act, int64_t step, float* y, int threads) {
    const PanelKernel read = isa().lookup->panel(weights);
    if (!read) throw std::invalid_argument("no kernel for many tokens of these weights");
    const Layout& l = weights.layout;
    const bool small = act == Act::int8;
    const int bytes = small && largest_entry(weights) <= isa().fixed->largest ? 1 : 2;
    const FixedShape shape = fixed_shape(l.columns, l.group, l.group_blocks * l.block_columns(), l.padded_columns(), step,
                                         small ? fixed_reach_of_int8 : fixed_reach_of_bytes, bytes);
    thread_local FixedInputs inputs;  // kept: memory that is new is slow
    fixed_inputs(shape, x, tokens, inputs, threads);
    fixed_panels(inputs, l.rows, y, l.rows, threads, [&](int64_t i, FixedPanel& panel) {
        // Rows that the last panel lacks are multiplied too: not by what another matrix left, whose sums may overflow.
        if ((i + 1) * fixed_rows > l.rows) std::fill(panel.integers.begin(), panel.integers.end(), uint8_t{0});
        read(weights, i, bytes, panel);
    });
}

void decode_levels(const Levels& levels, int64_t count, float* out, int threads) {
    const Layout& l = levels.layout;
    const int64_t R = l.rows_per_tile, first = levels.first, last = first + count;
    parallel_for((last + R - 1) / R - first / R, threads, [&](int64_t from, int64_t to) {
        std::vector<uint8_t> codes(R * l.padded_columns() + 64);
        const int64_t start = std::max(first, (first / R + from) * R), stop = std::min(last, (first / R + to) * R);
        isa().decode(levels, out + (start - first) * l.columns, codes.data(), start, stop);
    });
}

}  // namespace bitmill
