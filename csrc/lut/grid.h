// Inputs rounded to evenly spaced levels, x ~ scale * integer: the integers that the lookup kernels multiply, exactly.
// The rounding is that of formats/uniform.py to the last bit: scales in fp16, quotients to the nearest integer, ties to even.
#pragma once
#include "lookup.h"

namespace bitmill {

// `width` columns of a token share a scale, one for all with the columns of the matrix or more. Integers reach from -zero to
// 2^bits - 1 - zero; zero is 2^(bits-1) where symmetric, and otherwise that of the numbers. Columns in which an input of any
// token reaches `threshold` are not rounded and do not count for scales: 0 for none.
struct Grid {
    int bits = 8;
    int64_t width = 0;
    bool symmetric = true;
    float scale = 0, zero = 0;  // of all inputs, where scale is positive; else of each call's
    float threshold = 0;

    bool is_two_bytes() const { return bits == 8 && !symmetric; }  // integers of up to 255 either way
    bool operator==(const Grid& o) const {
        return bits == o.bits && width == o.width && symmetric == o.symmetric && scale == o.scale && zero == o.zero &&
               threshold == o.threshold;
    }
};

// True where no step of the kernels' inputs has columns of two scales.
bool has_grid(const Layout& layout, const Grid& grid);
// As read_inputs: x (tokens, layout.columns) into `out`, with 0 for the columns that are not rounded, out.kept. A token with NaN
// or Inf has NaN as steps. Returns int16 where an integer is no byte, or -128, which does not multiply as a byte everywhere, or
// where `wide`.
Act read_grid(const Layout& layout, const Grid& grid, const float* x, int64_t tokens, bool wide, Buffers& out);

}  // namespace bitmill
