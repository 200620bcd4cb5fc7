// y = x W^T where every block of columns of W^ is a scale times a sum of vectors, one of each codebook.
//
// The product of a block of inputs with a vector of a codebook is shared by all rows. So all products are computed
// once, and a code costs a lookup and an addition, for blocks of any width:
//
//     y_r = sum over groups g of scale[r, g] * sum over codes c of g of table[c][code[r, c]]
//
// The tables become integers of 13 bits with a step for each chunk of eight, in two byte tables, so that one vector
// looks up 64 rows at once. No product moves by more than 1/8190 of the largest in its chunk.
//
// Each row belongs to one thread: no two threads add to one output.
#pragma once
#include <cstdint>

#include "../lut/layout.h"

namespace bitmill {

struct Additive {
    Layout layout;  // of the codes: a column of it is a code, 64 rows a tile, groups of whole chunks
    int width, codebooks;
    const uint8_t* codes;
    const float* books;      // (codebooks, width, entries)
    const uint16_t* scales;  // fp16, (tiles, groups, 64)

    static constexpr int most_width = 16;
    static constexpr int reach = 4095;  // eight of them fit 16 bits
    static constexpr int rows = 64;     // of a tile
    // Entries of a table, which shorter ones repeat to fill: what instruction sets look up.
    int entries() const { return layout.bits <= 6 ? 64 : 256; }
    int64_t table_bytes() const { return layout.chunks() * 16 * entries(); }  // low bytes, then high, of eight
};

// What an instruction set has: the tables of chunks [first, last) for one token, and then the outputs of tiles.
struct AdditiveKernels {
    void (*tables)(const Additive&, const float* x, uint8_t* tables, float* steps, int64_t first, int64_t last);
    void (*tiles)(const Additive&, const uint8_t* tables, const float* steps, float* y, int64_t first, int64_t last);
};

// x (tokens, columns), y (tokens, rows).
void additive(const Additive& weights, const float* x, int64_t columns, int64_t tokens, float* y, int threads);

}  // namespace bitmill
