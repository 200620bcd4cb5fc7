// Layout of a matrix of codes in memory for the lookup kernels.
//
// A block is 64 codes, one byte each once unpacked: `rows_per_tile` (R) rows times 64 / R columns, row after row.
// R is 16, 4 or 1: so that every row of a block can have a table of its own in one vector register, or, with one
// table for all (R = 16), so that scales and zeros of 16 rows are handled at once and no sum crosses lanes. Or it is
// 64 (additive/), where every column has a table of its own.
//
// A chunk is 8 blocks along the columns in 64 * bits bytes: the bits of a code are split into fields of 4, 2 and
// 1 bits (7 = 4 + 2 + 1), and every field fills whole 64-byte vectors:
//
//     4-bit field   4 vectors, vector v holds blocks 2v and 2v + 1 in its low and high half bytes
//     2-bit field   2 vectors, vector v holds blocks 4v ... 4v + 3, lowest bits first
//     1-bit field   1 vector, bit i of every byte is of block i
//     8-bit codes   8 vectors, one a block
//
// so that a load, a shift and a mask give 64 codes at any width. Groups are padded to `group_blocks` blocks: a
// multiple of 8, or 2 or 4. A tile is R whole rows, padded to whole chunks; tiles follow each other.
#pragma once
#include <cstdint>

namespace bitmill {

struct Layout {
    int64_t rows, columns, group;  // `group` columns share a scale; the last group may be narrower
    int bits, rows_per_tile, group_blocks;

    int64_t tiles() const { return (rows + rows_per_tile - 1) / rows_per_tile; }
    int64_t block_columns() const { return 64 / rows_per_tile; }
    int64_t groups() const { return (columns + group - 1) / group; }
    // Columns of a tile's chunks: whole groups, the last one cut to what it needs where groups are whole chunks.
    int64_t chunks() const {
        int64_t blocks = groups() * group_blocks;
        if (group_blocks >= 8) {
            int64_t last = columns - (groups() - 1) * group;
            blocks = (groups() - 1) * group_blocks + (last + block_columns() - 1) / block_columns();
        }
        return (blocks + 7) / 8;
    }
    int64_t padded_columns() const { return chunks() * 8 * block_columns(); }
    // Groups that have parameters: with less than a chunk each, the last chunk may hold groups of padding.
    int64_t padded_groups() const { return group_blocks >= 8 ? groups() : chunks() * 8 / group_blocks; }
    int64_t tile_bytes() const { return chunks() * 64 * bits; }
};

// The 64 codes of block i of a chunk, one byte each.
void unpack_block(const uint8_t* chunk, int bits, int i, uint8_t* codes);

// Dense rows of codes, least significant bit first in 32-bit words (numerics/packing.py), to the layout above, and
// back. `words` is (rows, words_per_row); `out` of to_layout is zeroed by the caller.
void to_layout(const Layout& layout, const uint32_t* words, int64_t words_per_row, uint8_t* out, int threads);
// As to_layout, from one byte a code, (rows, columns).
void bytes_to_layout(const Layout& layout, const uint8_t* codes, uint8_t* out, int threads);
void from_layout(const Layout& layout, const uint8_t* stored, uint32_t* words, int64_t words_per_row, int threads);
// Codes of `count` rows from `first` on, one byte each, (count, columns).
void unpack_rows(const Layout& layout, const uint8_t* stored, int64_t first, int64_t count, uint8_t* out, int threads);
// Codes of any rows, in any order, (count, columns).
void gather_rows(const Layout& layout, const uint8_t* stored, const int64_t* rows, int64_t count, uint8_t* out, int threads);

}  // namespace bitmill
