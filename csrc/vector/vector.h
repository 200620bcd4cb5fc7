// y = x W^T, and W^ itself, for formats whose code of a block of columns names a vector, times a scale of the group.
//
// Their sets of vectors are too large for tables of products: a row is decoded a piece at a time, which stays in the
// first-level cache, and multiplied in fp32. Decoding rounds as the formats' own does, so that both agree bit by bit.
#pragma once
#include <cstdint>

namespace bitmill {

enum class VectorSet { e8, pyramid };

struct Vectors {
    VectorSet set;
    int64_t rows, columns;
    int64_t group;          // columns that share a scale
    const uint32_t* words;  // (rows, words_per_row): codes as stored
    int64_t words_per_row;
    const float* scales;    // (rows or 1, groups)
    int64_t groups;
    bool own_scales;        // of every row
    int bits;               // of the pyramid: 1 to 4
    const float* table;     // e8: (256, 8) absolute values; pyramid: 16 lengths

    const float* scales_of(int64_t row) const { return scales + (own_scales ? row * groups : 0); }
    static constexpr int64_t piece = 1024;  // columns decoded at a time
    int64_t padded_columns() const { return (columns + 15) / 16 * 16; }
};

// What an instruction set has, for rows [first, last). x is (tokens, padded columns), zero where padded.
struct VectorKernels {
    void (*linear)(const Vectors&, const float* x, int64_t tokens, float* y, int64_t first, int64_t last);
    void (*decode)(const Vectors&, float* out, int64_t first, int64_t last);  // out is (last - first, columns)
};

// x (tokens, columns), y (tokens, rows).
void vector_linear(const Vectors& weights, const float* x, int64_t tokens, float* y, int threads);
// Rows from `first` on, (count, columns).
void vector_decode(const Vectors& weights, int64_t first, int64_t count, float* out, int threads);

}  // namespace bitmill
