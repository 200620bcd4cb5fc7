// Products of many tokens (linear.h). Rows are decoded a tile at a time, about a second-level cache of them, and multiply as
// integers of 16 bits (fixed/fixed.h) or, where inputs are not rounded, as floats.
#include <algorithm>
#include <cstring>

#include "../isa.h"
#include "../lut/linear.h"
#include "../threads.h"
#include "linear.h"
#include "step.h"

namespace bitmill {
namespace {

constexpr int64_t tile_weights = int64_t{1} << 20;  // as runtime/kernels/reference.py decodes them
constexpr int64_t block_columns = 512;              // of a panel of floats, which stays in a first-level cache

// y (tokens, rows of the whole matrix) from rows of it: pack(row, count, first, last, panel) writes columns [first, last) of up
// to 16 rows side by side, (columns, 16).
template <class Pack>
void multiply_floats(const float* x, const Piece& piece, int64_t rows, int64_t columns, float* y, int64_t y_stride, const Pack& pack) {
    parallel_for((rows + 15) / 16, piece.threads, [&](int64_t from, int64_t to) {
        std::vector<float> panel(16 * std::min(columns, block_columns));
        for (; from < to; ++from) {
            const int64_t row = 16 * from, count = std::min<int64_t>(16, rows - row);
            for (int64_t first = 0, last; first < columns; first = last) {
                last = std::min(columns, first + block_columns);
                pack(row, count, first, last, panel.data());
                isa().step->tiles(x + first, columns, piece.tokens, panel.data(), 16, last - first, y + row, y_stride, count, first > 0);
            }
        }
    });
}

void pack_floats(const float* W, int64_t columns, int64_t row, int64_t count, int64_t first, int64_t last, float* panel) {
    if (count < 16) std::fill(panel, panel + 16 * (last - first), 0.0f);
    for (int64_t r = 0; r < count; ++r)
        for (int64_t c = first; c < last; ++c) panel[16 * (c - first) + r] = W[(row + r) * columns + c];
}

// change(token) for all of them, on all threads.
template <class Change>
void each_token(const Piece& piece, const Change& change) {
    parallel_for(piece.tokens, piece.threads, [&](int64_t first, int64_t last) {
        for (; first < last; ++first) change(first);
    });
}

}  // namespace

void Linear::product(const float* x, const Piece& piece, float* y) const {
    piece.tokens <= few_tokens ? few(x, piece, y) : many(x, piece, y);
}

void Linear::few(const float* x, const Piece& piece, float* y) const {
    std::vector<float> common(shared);
    in_team(piece.threads, [&](const Team& team) {
        RoundedInputs inputs;
        std::vector<float> room(own);
        for (int64_t t = 0; t < piece.tokens; ++t) {
            inputs.changed();
            apply(team, {inputs, room.data(), common.data()}, x + t * columns, y + t * rows);
            team.wait();
        }
    });
}

void Linear::many(const float* x, const Piece& piece, float* y) const {
    thread_local FixedInputs inputs;  // kept: memory that is new is slow
    thread_local std::vector<float> tile;
    const int64_t step = std::max<int64_t>(1, tile_weights / columns);
    if (!piece.floats) fixed_inputs(fixed_shape(columns), {x, nullptr, nullptr, 0}, piece.tokens, inputs, piece.threads);
    tile.resize(std::min(step, rows) * columns);
    const float* W = tile.data();
    for (int64_t first = 0; first < rows; first += step) {
        const int64_t count = std::min(step, rows - first);
        decode(first, count, tile.data(), piece.threads);
        if (!piece.floats) fixed_product(inputs, W, count, y + first, rows, piece.threads);
        else
            multiply_floats(x, piece, count, columns, y + first, rows, [&](int64_t row, int64_t of, int64_t from, int64_t to, float* panel) {
                pack_floats(W, columns, row, of, from, to, panel);
            });
    }
}

void LookupLinear::read_pieces(std::shared_ptr<const Panels> with, Act rounded, int64_t step_columns, std::shared_ptr<const Codes> of) {
    panels = std::move(with), codes = std::move(of), many_act = rounded, many_step = step_columns;
}

void LookupLinear::few(const float* x, const Piece& piece, float* y) const {
    linear(weights, x, piece.tokens, act, y, piece.threads);
}

void LookupLinear::many(const float* x, const Piece& piece, float* y) const {
    if (panels) return linear_gemm(panels->weights, {x, nullptr, nullptr, 0}, piece.tokens, many_act, many_step, y, piece.threads);
    Linear::many(x, {piece.tokens, piece.floats || act == Act::float32, piece.threads}, y);
}

void LookupLinear::decode(int64_t first, int64_t count, float* out, int threads) const {
    Levels some = codes->levels;
    // numbers of each row are those from `first` on
    if (some.ids && some.id_rows > 1) some.ids += first * some.id_groups;
    if (some.scale_rows > 1) some.scales += first * some.scale_groups;
    if (some.zero_rows > 1) some.zeros += first * some.zero_groups;
    some.first = first;
    decode_levels(some, count, out, threads);
}

void DenseLinear::many(const float* x, const Piece& piece, float* y) const {
    multiply_floats(x, piece, rows, columns, y, rows, [&](int64_t row, int64_t count, int64_t first, int64_t last, float* panel) {
        if (wide) return pack_floats(static_cast<const float*>(weights), columns, row, count, first, last, panel);
        if (count < 16) std::fill(panel, panel + 16 * (last - first), 0.0f);
        for (int64_t r = 0; r < count; ++r) {
            const uint16_t* W = static_cast<const uint16_t*>(weights) + (row + r) * columns;
            for (int64_t c = first; c < last; ++c) {
                const uint32_t bits = static_cast<uint32_t>(W[c]) << 16;
                std::memcpy(panel + 16 * (c - first) + r, &bits, sizeof(float));
            }
        }
    });
}

void TransposedLinear::many(const float* x, const Piece& piece, float* y) const {
    multiply_floats(x, piece, rows, columns, y, rows, [&](int64_t row, int64_t count, int64_t first, int64_t last, float* panel) {
        if (count < 16) std::fill(panel, panel + 16 * (last - first), 0.0f);
        for (int64_t c = first; c < last; ++c) std::copy_n(weights + c * rows + row, count, panel + 16 * (c - first));
    });
}

void VectorLinear::decode(int64_t first, int64_t count, float* out, int threads) const {
    vector_decode(weights, first, count, out, threads);
}

void PointsLinear::decode(int64_t first, int64_t count, float* out, int threads) const {
    points_decode(weights, columns, first, count, out, threads);
}

void LatticeLinear::decode(int64_t first, int64_t count, float* out, int threads) const {
    lattice_decode(weights, columns, first, count, out, threads);
}

void OutlierLinear::many(const float* x, const Piece& piece, float* y) const {
    std::vector<float> rest(piece.tokens * inner.columns);
    each_token(piece, [&](int64_t t) {
        for (int64_t i = 0; i < inner.columns; ++i) rest[t * inner.columns + i] = x[t * columns + base[i]];
    });
    inner.product(rest.data(), piece, y);
    each_token(piece, [&](int64_t t) {
        std::vector<float> few(count);
        for (int64_t i = 0; i < count; ++i) few[i] = x[t * columns + outliers[i]];
        isa().step->add_fp16(values, count, few.data(), y + t * rows, 0, rows);
    });
}

void LowRankLinear::many(const float* x, const Piece& piece, float* y) const {
    inner.product(x, piece, y);
    each_token(piece, [&](int64_t t) {
        std::vector<float> between(rank);
        isa().step->add_fp16(right, columns, x + t * columns, between.data(), 0, rank);
        isa().step->add_fp16(left, rank, between.data(), y + t * rows, 0, rows);
    });
}

void RotatedLinear::many(const float* x, const Piece& piece, float* y) const {
    std::vector<float> turned(x, x + piece.tokens * columns);
    each_token(piece, [&](int64_t t) {
        for (int64_t i = 0; rescale && i < columns; ++i) turned[t * columns + i] /= rescale[i];
    });
    rotate(inputs, turned.data(), piece.tokens, piece.threads);
    inner.product(turned.data(), piece, y);
    if (outputs.count) rotate(outputs, y, piece.tokens, piece.threads);
}

void SumLinear::many(const float* x, const Piece& piece, float* y) const {
    inner.product(x, piece, y);
    sparse_add(entries, x, piece.tokens, y, piece.threads);
}

void PermutedLinear::many(const float* x, const Piece& piece, float* y) const {
    std::vector<float> moved(piece.tokens * columns);
    each_token(piece, [&](int64_t t) {
        for (int64_t i = 0; i < columns; ++i) moved[t * columns + i] = x[t * columns + order[i]];
    });
    inner.product(moved.data(), piece, y);
}

}  // namespace bitmill
