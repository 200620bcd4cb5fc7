// Matrices of the lookup kernels: y = x W^T from codes of 1 to 8 bits, by table lookup.
//
//     W^[r, k] = row_scale[r] * scale[r, g] * (table[code] - zero[r, g])            g the group of column k
#pragma once
#include <cstdint>
#include <vector>

#include "layout.h"

namespace bitmill {

// Table of a code: one for all rows, one of each row (or of each row and group), or one of a bank of up to 32, whose entries
// are at most 63.
enum class Source { shared, own, bank };
enum class Zero { constant, bytes, halves };
enum class Act { int8, int16, float32 };  // the type that inputs are rounded to

struct Weights {
    Layout layout;
    Source source;
    bool wide;
    const uint8_t* codes;
    const uint8_t* tables;      // records of V::Whole or V::Lanes; of a wide table the low bytes, then the high;
                                // for float32 of fp32, row by row
    bool mirrored;              // own tables of 3 or 4 bits hold the first half: entry[~code] = ~entry[code]
    int64_t record_bytes;       // of one table record
    int64_t records_per_tile;   // 0 for one record in all, 1, or one for every padded group
    const uint8_t* ids;         // (tiles, padded groups, R): table + tables_in_bank * power, with a bank
    int bank_bits;              // log2 of tables_in_bank
    const float* powers;        // (16,) factors that ids name
    const void* scales;         // fp16, or fp32 with `wide_scales`, (tiles, padded groups, R); null for 1
    bool wide_scales;
    Zero zero_kind;
    float zero;                 // the constant
    const void* zeros;          // (tiles, padded groups, R)
    const float* row_scales;    // (tiles, R)

    // Tables of 4 bits in a bank that are sums of what two pairs of bits stand for serve 16 rows: V::Sums.
    bool summed() const { return source == Source::bank && layout.bits == 4 && layout.rows_per_tile == 16; }
};

// Inputs of a few tokens in the padded order of columns. `sums` are of the inputs as the kernel sees them.
struct Inputs {
    const int8_t* bytes;   // (tokens, padded columns); of int16 the high bytes
    const int8_t* lows;    // of int16 the low bytes: x = 255 high + low, each from -127 to 127
    const float* steps;    // (tokens, blocks / step_blocks)
    const float* sums;     // (tokens, padded groups)
    const float* floats;   // (tokens, padded columns), with float32 in place of the first three
    int64_t columns, step_count, groups;  // strides of a token
};

// Blocks that share one step of the inputs: those of 32 columns, of 64 where blocks are wide, or of the group.
constexpr int step_blocks(int rows_per_tile, int group_blocks) {
    const int most = rows_per_tile == 16 ? 8 : rows_per_tile == 4 ? 4 : 1;
    return group_blocks < most ? group_blocks : most;
}

// Numbers of one record of tables, of a tile or of a tile's group: whole vectors can be read from wherever one starts.
constexpr int64_t float_record(int bits, int rows_per_tile, Source source) {
    const int64_t one = int64_t{1} << bits, all = source == Source::shared ? one : one * rows_per_tile;
    return all < 64 ? 64 : all;
}

// Memory that holds inputs from call to call (inputs-inl.h).
struct Buffers {
    std::vector<float> padded, steps, sums;
    std::vector<int8_t> bytes, lows;
    Inputs inputs{};
    std::vector<int64_t> kept;    // columns that are not rounded, see lut/grid.h
    std::vector<float> rounded;   // inputs without those, (tokens, columns)
};

// Tiles [first, last) of T tokens; y is (tokens, stride).
using Kernel = void (*)(const Weights&, const Inputs&, float* y, int64_t stride, int64_t first, int64_t last);

struct FixedPanel;  // fixed/fixed.h
using PanelKernel = void (*)(const Weights&, int64_t panel, int bytes, FixedPanel& out);  // 1 or 2 bytes an integer

// Kernels of an instruction set: `choose` returns the kernel for some weights and 1 or 4 tokens at once, `floats` that for
// float32 inputs and one token, `panel` the function that unpacks 16 rows for many tokens; null if there is none (see
// lut/choose-inl.h).
struct LookupKernels {
    Kernel (*choose)(const Weights& w, Act act, int tokens);
    Kernel (*floats)(const Weights& w);
    PanelKernel (*panel)(const Weights& w);
};
extern const LookupKernels avx512_lookup, avx2_lookup, neon_lookup, scalar_lookup;

}  // namespace bitmill
