// W^ from codes of the layout, bit by bit as a format's `dequantize` computes it (formats/lookup.py).
//
//     W^[r, k] = scale[r, g] * (tables[id[r, g]][code] - zero[r, g])               g the group of column k
#pragma once
#include <cstdint>

#include "layout.h"

namespace bitmill {

// Numbers are of one row or of each from `first` on, of one group or of each.
struct Levels {
    Layout layout;
    const uint8_t* codes;
    int64_t first;
    const float* tables;   // of 2^bits numbers, and 64 more at the end that are read and not used
    const int32_t* ids;    // null for 0
    const float *scales, *zeros;
    int64_t id_rows, id_groups, scale_rows, scale_groups, zero_rows, zero_groups;

    int64_t at(int64_t rows, int64_t groups, int64_t row, int64_t group) const {
        return (rows > 1 ? (row - first) * groups : 0) + (groups > 1 ? group : 0);
    }
    int64_t ids_at(int64_t row, int64_t group) const { return at(id_rows, id_groups, row, group); }
    int64_t scales_at(int64_t row, int64_t group) const { return at(scale_rows, scale_groups, row, group); }
    int64_t zeros_at(int64_t row, int64_t group) const { return at(zero_rows, zero_groups, row, group); }
};

// Rows [first, last), (last - first, columns); `codes` has room for a tile's and 64 more.
using DecodeRows = void (*)(const Levels&, float* out, uint8_t* codes, int64_t first, int64_t last);

// Rows from levels.first on, (count, columns).
void decode_levels(const Levels& levels, int64_t count, float* out, int threads);

}  // namespace bitmill
