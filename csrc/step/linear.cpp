#include "linear.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "../isa.h"
#include "../lut/linear.h"
#include "../threads.h"
#include "step.h"

namespace bitmill {
namespace {

constexpr int64_t floats_of(int64_t bytes) { return (bytes + 3) / 4; }

Kernel lookup_kernel(const Weights& w, Act act) {
    const LookupKernels& best = *isa().lookup;
    return act == Act::float32 ? best.floats(w) : best.choose(w, act, 1);
}

bool alike(const Layout& a, const Layout& b) {
    return a.columns == b.columns && a.group == b.group && a.rows_per_tile == b.rows_per_tile &&
           a.group_blocks == b.group_blocks;
}

}  // namespace

const Inputs& RoundedInputs::of(const Layout& needed, const float* x, Act as) {
    if (from != x || act != as || grid.width || !alike(layout, needed)) {
        isa().read_inputs(needed, x, 1, as, buffers);
        from = x, layout = needed, act = as, grid.width = 0;
    }
    return buffers.inputs;
}

const Inputs& RoundedInputs::of(const Layout& needed, const Grid& levels, bool two_bytes, const float* x, Act& as) {
    if (from != x || !(grid == levels) || wide != two_bytes || !alike(layout, needed)) {
        act = read_grid(needed, levels, x, 1, two_bytes, buffers);
        from = x, layout = needed, grid = levels, wide = two_bytes;
    }
    as = act;
    return buffers.inputs;
}

LookupLinear::LookupLinear(const Weights& weights, Act act)
    : Linear(weights.layout.rows, weights.layout.columns), weights(weights), act(act) {
    if (!lookup_kernel(weights, act)) throw std::invalid_argument("no kernel for these weights");
}

void LookupLinear::apply(const Team& team, Workspace room, const float* x, float* y) const {
    const auto [first, last] = team.share(weights.layout.tiles());
    if (first < last) lookup_kernel(weights, act)(weights, room.inputs.of(weights.layout, x, act), y, rows, first, last);
}

bool LookupLinear::row(int64_t row, float* out) const {
    lookup_row(weights, act, row, out);
    return true;
}

void LookupLinear::column_numbers(const int64_t* places, int64_t count, float* out, int threads) const {
    const int64_t R = weights.layout.rows_per_tile;
    parallel_for(weights.layout.tiles(), threads, [&](int64_t first, int64_t last) {
        lookup_columns(weights, act, places, count, first, last, out + first * R * count);
    });
}

GridLinear::GridLinear(const Weights& weights, const Grid& grid)
    : Linear(weights.layout.rows, weights.layout.columns), weights(weights), grid(grid), wide(needs_wide_grid(weights)) {
    if (!has_grid_linear(weights, grid)) throw std::invalid_argument("no kernel for these inputs");
}

void GridLinear::apply(const Team& team, Workspace room, const float* x, float* y) const {
    const auto [first, last] = team.share(weights.layout.tiles());
    if (first >= last) return;
    Act act;
    const Inputs& in = room.inputs.of(weights.layout, grid, wide, x, act);
    lookup_kernel(weights, act)(weights, in, y, rows, first, last);
    add_columns(weights, act, room.inputs.kept(), x, 1, y, first, last);
}

void GridLinear::product(const float* x, int64_t tokens, float* y, int threads) const {
    grid_linear(weights, grid, x, tokens, y, threads);
}

OutlierLinear::OutlierLinear(const Linear& inner, const int64_t* base, const int64_t* outliers, const uint16_t* values, int64_t count)
    : Linear(inner.rows, inner.columns + count), inner(inner), base(base), outliers(outliers), values(values), count(count) {
    own = columns + inner.own;
    shared = inner.shared;
}

void OutlierLinear::apply(const Team& team, Workspace room, const float* x, float* y) const {
    float *few = room.own, *rest = room.own + count;
    for (int64_t i = 0; i < count; ++i) few[i] = x[outliers[i]];
    for (int64_t i = 0; i < inner.columns; ++i) rest[i] = x[base[i]];
    room.inputs.changed();
    inner.apply(team, {room.inputs, room.own + columns, room.shared}, rest, y);
    room.inputs.changed();
    team.wait();
    const auto [first, last] = team.share(rows);
    isa().step->add_fp16(values, count, few, y, first, last);
}

LowRankLinear::LowRankLinear(const Linear& inner, const uint16_t* left, const uint16_t* right, int64_t rank)
    : Linear(inner.rows, inner.columns), inner(inner), left(left), right(right), rank(rank) {
    own = rank + inner.own, shared = inner.shared;
}

void LowRankLinear::apply(const Team& team, Workspace room, const float* x, float* y) const {
    inner.apply(team, {room.inputs, room.own + rank, room.shared}, x, y);
    std::fill(room.own, room.own + rank, 0.0f);
    isa().step->add_fp16(right, columns, x, room.own, 0, rank);  // by every thread: it is thin
    team.wait();
    const auto [first, last] = team.share(rows);
    isa().step->add_fp16(left, rank, room.own, y, first, last);
}

void DenseLinear::apply(const Team& team, Workspace, const float* x, float* y) const {
    const auto [first, last] = team.share(rows);
    const StepKernels& best = *isa().step;
    if (wide) best.dense(static_cast<const float*>(weights), columns, x, y, first, last);
    else best.dense_bf16(static_cast<const uint16_t*>(weights), columns, x, y, first, last);
}

bool DenseLinear::row(int64_t row, float* out) const {
    if (wide) std::memcpy(out, static_cast<const float*>(weights) + row * columns, columns * sizeof(float));
    for (int64_t i = 0; !wide && i < columns; ++i) {
        const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(weights)[row * columns + i]) << 16;
        std::memcpy(out + i, &bits, sizeof(float));
    }
    return true;
}

void TransposedLinear::apply(const Team& team, Workspace, const float* x, float* y) const {
    const auto [first, last] = team.share(rows);
    isa().step->transposed(weights, rows, columns, x, y, first, last);
}

VectorLinear::VectorLinear(const Vectors& weights) : Linear(weights.rows, weights.columns), weights(weights) {
    own = weights.padded_columns();
}

void VectorLinear::apply(const Team& team, Workspace room, const float* x, float* y) const {
    std::memcpy(room.own, x, columns * sizeof(float));
    std::fill(room.own + columns, room.own + own, 0.0f);
    const auto [first, last] = team.share(rows);
    isa().vector->linear(weights, room.own, 1, y, first, last);
}

void PointsLinear::apply(const Team& team, Workspace room, const float* x, float* y) const {
    if (own) {  // the last point is cut
        std::memcpy(room.own, x, columns * sizeof(float));
        std::fill(room.own + columns, room.own + own, 0.0f);
        room.inputs.changed();
        x = room.own;
    }
    const auto [first, last] = team.share(weights.layout.tiles());
    if (first < last) points_tiles(weights, room.inputs.of(weights.layout, x, act), x, 1, act, y, first, last);
    if (own) room.inputs.changed();
}

void LatticeLinear::apply(const Team& team, Workspace room, const float* x, float* y) const {
    lattice_order(x, columns, room.own, own);
    room.inputs.changed();
    const auto [first, last] = team.share(weights.layout.tiles());
    const Inputs& in = room.inputs.of(weights.layout, room.own, act);
    if (first < last) isa().vector->lattice_linear(weights, in, act, 1, y, first, last);
    room.inputs.changed();
}

AdditiveLinear::AdditiveLinear(const Additive& weights, int64_t columns)
    : Linear(weights.layout.rows, columns), weights(weights),
      padded(weights.layout.columns / weights.codebooks * weights.width) {
    own = padded;
    shared = weights.layout.chunks() + floats_of(weights.table_bytes());
}

void AdditiveLinear::apply(const Team& team, Workspace room, const float* x, float* y) const {
    const AdditiveKernels& best = *isa().additive;
    std::memcpy(room.own, x, columns * sizeof(float));
    std::fill(room.own + columns, room.own + padded, 0.0f);  // the last block may be ragged
    const int64_t chunks = weights.layout.chunks();
    float* steps = room.shared;
    uint8_t* tables = reinterpret_cast<uint8_t*>(room.shared + chunks);
    team.wait();  // for those who still read the tables of another layer
    const auto mine = team.share(chunks);
    best.tables(weights, room.own, tables, steps, mine.first, mine.second);
    team.wait();
    const auto [first, last] = team.share(weights.layout.tiles());
    best.tiles(weights, tables, steps, y, first, last);
}

RotatedLinear::RotatedLinear(const Linear& inner, const float* rescale, const Rotation& inputs, const Rotation& outputs)
    : Linear(inner.rows, inner.columns), inner(inner), rescale(rescale), inputs(inputs), outputs(outputs) {
    own = columns + std::max({columns, rows, inner.own});
    shared = inner.shared;
}

void RotatedLinear::apply(const Team& team, Workspace room, const float* x, float* y) const {
    float *turned = room.own, *rest = room.own + columns;
    for (int64_t i = 0; i < columns; ++i) turned[i] = rescale ? x[i] / rescale[i] : x[i];
    isa().rotation->rotate(inputs, turned, rest);
    room.inputs.changed();
    inner.apply(team, {room.inputs, rest, room.shared}, turned, y);
    room.inputs.changed();
    if (!outputs.count) return;
    team.wait();
    if (team.self == 0) isa().rotation->rotate(outputs, y, rest);
}

SumLinear::SumLinear(const Linear& inner, const Sparse& entries)
    : Linear(inner.rows, inner.columns), inner(inner), entries(entries) {
    own = inner.own, shared = inner.shared;
}

void SumLinear::apply(const Team& team, Workspace room, const float* x, float* y) const {
    inner.apply(team, room, x, y);
    team.wait();
    const auto [first, last] = team.share(rows);
    isa().sparse->add(entries, x, 1, y, first, last);
}

PermutedLinear::PermutedLinear(const Linear& inner, const int64_t* order)
    : Linear(inner.rows, inner.columns), inner(inner), order(order) {
    own = columns + inner.own;
    shared = inner.shared;
}

void PermutedLinear::apply(const Team& team, Workspace room, const float* x, float* y) const {
    for (int64_t i = 0; i < columns; ++i) room.own[i] = x[order[i]];
    room.inputs.changed();
    inner.apply(team, {room.inputs, room.own + columns, room.shared}, room.own, y);
    room.inputs.changed();
}

}  // namespace bitmill
