// y = x W^T, and W^ itself, for formats whose code of a block of columns names a vector, times a scale of the group.
//
// Their sets of vectors are too large for tables of products: a row is decoded a piece at a time, which stays in the
// first-level cache, and multiplied in fp32. Decoding rounds as the formats' own does, so that both agree bit by bit.
// With one scale per row, codes are repacked as small integers instead, which is many times faster.
#pragma once
#include <cstdint>

#include "../lut/lookup.h"

namespace bitmill {

enum class VectorSet { e8, pyramid, trellis };

constexpr int trellis_block = 64;   // numerics/trellis.py: BLOCK
constexpr int trellis_window = 24;  // numbers on either side of a seam that choose its state

// What a block of trellis codes is encoded with.
struct Trellis {
    int bits, state_bits;
    const int16_t* levels;  // (2^state_bits)
};

struct Vectors {
    VectorSet set;
    int64_t rows, columns;
    int64_t group;          // columns that share a scale
    const uint32_t* words;  // (rows, words_per_row): codes as stored
    int64_t words_per_row;
    const float* scales;    // (rows or 1, groups)
    int64_t groups;
    bool own_scales;        // of every row
    int bits;               // of a pyramid or a trellis: 1 to 4
    const float* table;     // e8: (256, 8) absolute values; pyramid: 16 lengths; trellis: levels of all states
    int state_bits = 0;     // of a trellis

    const float* scales_of(int64_t row) const { return scales + (own_scales ? row * groups : 0); }
    static constexpr int64_t piece = 1024;  // columns decoded at a time
    int64_t padded_columns() const { return (columns + 15) / 16 * 16; }
};

// Repacked pyramid points: vector/points-inl.h.
struct Points {
    Layout layout;            // of coordinates of bits + 1 bits; columns are whole points
    const uint8_t* codes;
    const uint8_t* gains;  // (tiles, chunks, 16): of a row's two points in a chunk, the first in the low half
    const float* lengths;     // the 16 of them, 16 times
    const float* scales;      // (rows or 1)
    bool own_scales;
    const int32_t* odd_starts;  // (rows + 1): where a row's odd points start, in the order of their places
    const int32_t* odd_places;  // which point of the row
    const int8_t* odd_points;   // (odd points, 16)

    float scale_of(int64_t row) const { return scales[own_scales ? row : 0]; }
    int gain(int64_t row, int64_t point) const {
        return gains[(row / 16 * layout.chunks() + point / 2) * 16 + row % 16] >> 4 * (point % 2) & 15;
    }
    int odd_gain(int64_t row, int64_t odd) const { return gain(row, odd_places[odd]); }
};

// Repacked points of E8: vector/lattice-inl.h.
struct Lattice {
    static constexpr int64_t square_bytes = 128;
    Layout layout;         // of 2 bits and whole squares of 32 columns: only its sizes count
    const uint8_t* codes;
    const uint8_t* sizes;  // (2, 256): of every pattern's coordinates
    const float* scales;   // (rows or 1)
    bool own_scales;

    float scale_of(int64_t row) const { return scales[own_scales ? row : 0]; }
};

// Kernels of an instruction set, for rows [first, last). x is (tokens, padded columns), zero where padded.
struct VectorKernels {
    void (*linear)(const Vectors&, const float* x, int64_t tokens, float* y, int64_t first, int64_t last);
    void (*decode)(const Vectors&, float* out, int64_t first, int64_t last);  // out is (last - first, columns)
    // Coordinates (last - first, whole blocks * 16) and gains (last - first, blocks) of a pyramid's points.
    void (*coordinates)(const Vectors&, int8_t* y, uint8_t* gains, int64_t first, int64_t last);
    // Of x (count, 16): vector/nearest-inl.h.
    void (*nearest_points)(int bits, const float* lengths, int64_t count, const float* x, uint8_t* codes,
                           float* vectors);
    // Of x (count, trellis_block): vector/viterbi-inl.h.
    void (*trellis_codes)(const Trellis&, int64_t count, const int16_t* x, int kept, uint8_t* codes);
    // Repacked points: tiles [first, last), and rows [first, last) of W^.
    void (*points_linear)(const Points&, const Inputs&, Act, int64_t tokens, float* y, int64_t first,
                          int64_t last);
    void (*points_decode)(const Points&, float* out, int64_t columns, int64_t first, int64_t last);
    void (*lattice_linear)(const Lattice&, const Inputs&, Act, int64_t tokens, float* y, int64_t first,
                           int64_t last);
    void (*lattice_decode)(const Lattice&, float* out, int64_t columns, int64_t first, int64_t last);
};

// x (tokens, columns), y (tokens, rows).
void vector_linear(const Vectors& weights, const float* x, int64_t tokens, float* y, int threads);
// Rows from `first` on, (count, columns).
void vector_decode(const Vectors& weights, int64_t first, int64_t count, float* out, int threads);

// Coordinates and gains of packed points, and the inverse: packed words (rows, words_per_row).
void coordinates(const Vectors& weights, int8_t* y, uint8_t* gains, int threads);
// Codes (count, 4 * bits + 1) and points (count, 16), with their lengths, nearest to x (count, 16).
void nearest_points(int bits, const float* lengths, int64_t count, const float* x, uint8_t* codes, float* vectors,
                    int threads);
// Codes (count, trellis_block / 8 * bits) of the paths nearest to x (count, trellis_block); the first `kept` numbers of
// blocks, a multiple of 16, keep their levels where it is above 0.
void trellis_codes(const Trellis& trellis, int64_t count, const int16_t* x, int kept, uint8_t* codes, int threads);
// True if all points have the pulses that numbers of so many bits have, and gains fit their four bits.
bool are_points(int bits, int64_t count, const int8_t* y, const uint8_t* gains);
void numbers(int bits, int64_t rows, int64_t points, const int8_t* y, const uint8_t* gains, uint32_t* words,
             int64_t words_per_row, int threads);
// x (tokens, columns) and W^ (.., columns), whose last point may be cut.
void points_linear(const Points& weights, const float* x, int64_t columns, int64_t tokens, Act act, float* y,
                   int threads);
// Tiles [first, last) of it, with `inputs` what the lookup kernels read of x, (tokens, layout.columns), zero where padded.
void points_tiles(const Points& weights, const Inputs& inputs, const float* x, int64_t tokens, Act act,
                  float* y, int64_t first, int64_t last);
void points_decode(const Points& weights, int64_t columns, int64_t first, int64_t count, float* out,
                   int threads);

// x (columns) in the order that the lattice's inputs are read in, (layout.columns), zero where padded.
void lattice_order(const float* x, int64_t columns, float* out, int64_t width);
// x (tokens, columns) and W^ (.., columns), which may end within a square.
void lattice_linear(const Lattice& weights, const float* x, int64_t columns, int64_t tokens, Act act,
                    float* y, int threads);
void lattice_decode(const Lattice& weights, int64_t columns, int64_t first, int64_t count, float* out,
                    int threads);

}  // namespace bitmill
