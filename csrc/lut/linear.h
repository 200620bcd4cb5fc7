// y = x W^T for a few tokens, on all threads, with the best instruction set there is or the one asked for.
#pragma once
#include "kernel.h"

namespace bitmill {

// x (tokens, columns), y (tokens, rows). Throws std::invalid_argument where there is no kernel for the weights.
void linear(const Weights& weights, const float* x, int64_t tokens, Act act, float* y, int threads);

// The same for many tokens, by integers of 16 bits; whether there is a kernel for the weights.
void linear_of_many(const Weights& weights, const float* x, int64_t tokens, float* y, int threads);
bool has_panels(const Weights& weights);

// One row of W^, with whatever rounding its tables have.
void lookup_row(const Weights& weights, Act act, int64_t row, float* out);

// The sum of all 64-bit words: as fast as memory can be read.
uint64_t read_all(const uint8_t* bytes, int64_t count, int threads);

}  // namespace bitmill
