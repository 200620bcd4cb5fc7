// y = x W^T for a few tokens, on all threads, with the best instruction set or the selected one.
#pragma once
#include "../fixed/fixed.h"
#include "grid.h"
#include "lookup.h"

namespace bitmill {

// x (tokens, columns), y (tokens, rows). Throws std::invalid_argument if no kernel supports the weights.
void linear(const Weights& weights, const float* x, int64_t tokens, Act act, float* y, int threads);

// As `linear`, of inputs that are rounded to a grid first (lut/grid.h), and multiplied as they are rounded.
bool has_grid_linear(const Weights& weights, const Grid& grid);
void grid_linear(const Weights& weights, const Grid& grid, const float* x, int64_t tokens, float* y, int threads);
// Type of the inputs of that kernel: int16 alone where entries have two bytes and there is no other kernel.
bool needs_wide_grid(const Weights& weights);

// As `linear`, for many tokens, by integers of 8 or 16 bits (fixed/fixed.h) with a step for every `step` columns of a token
// (see fixed_shape), which x may already be. has_gemm: true if a kernel supports the weights.
void linear_gemm(const Weights& weights, const FixedSource& x, int64_t tokens, Act act, int64_t step, float* y, int threads);
bool has_gemm(const Weights& weights);

// One row of W^, as its tables are rounded.
void lookup_row(const Weights& weights, Act act, int64_t row, float* out);
// Columns of the rows of tiles [first, last), as lookup_row: out (rows, count).
void lookup_columns(const Weights& weights, Act act, const int64_t* columns, int64_t count, int64_t first, int64_t last, float* out);
// Adds the product with columns that are not rounded, for the rows of those tiles: x (tokens, columns), y (tokens, rows).
void add_columns(const Weights& weights, Act act, const std::vector<int64_t>& columns, const float* x, int64_t tokens, float* y,
                 int64_t first, int64_t last);

// The sum of all 64-bit words: as fast as memory can be read.
uint64_t read_all(const uint8_t* bytes, int64_t count, int threads);

}  // namespace bitmill
