// Inputs rounded to evenly spaced levels, x ~ scale * integer: the integers that the lookup kernels multiply, exactly.
// The rounding is that of formats/uniform.py to the last bit: scales in fp16, quotients to the nearest integer, ties to even.
#pragma once
#include "lookup.h"

namespace bitmill {

// `width` columns of a token share a scale, one for all with the columns of the matrix or more. Integers reach from -zero to
// 2^bits - 1 - zero; zero is 2^(bits-1) where symmetric, and otherwise that of the numbers, for up to 7 bits.
struct Grid {
    int bits = 8;
    int64_t width = 0;
    bool symmetric = true;
    float scale = 0, zero = 0;  // of all inputs, where scale is positive; else of each call's

    bool operator==(const Grid& o) const {
        return bits == o.bits && width == o.width && symmetric == o.symmetric && scale == o.scale && zero == o.zero;
    }
};

// True where no step of the kernels' inputs has columns of two scales, and all integers are bytes.
bool has_grid(const Layout& layout, const Grid& grid);
// As read_inputs: x (tokens, layout.columns) into `out`. A token with NaN or Inf has NaN as steps. Returns int16 where an integer
// is -128, which does not multiply as a byte everywhere, or where `wide`.
Act read_grid(const Layout& layout, const Grid& grid, const float* x, int64_t tokens, bool wide, Buffers& out);

}  // namespace bitmill
