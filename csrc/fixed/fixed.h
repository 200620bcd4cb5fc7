// Y = X W^T of many tokens by integers: of 16 bits, which multiply twice as fast as fp32, or of 8, twice as fast again. Every
// step of x covers a part of a row, and products of up to 64 columns, a span, sum up exactly in 32 bits:
//
//     y_tr = sum over spans of step_ts * step_rs * (sum of integers of x times those of w) - offset_rg * sum of x_tg
//
// W comes as floats, whose integers reach as far as those of x (64 * 5792^2 < 2^31: half a step is 1/11584 of the largest
// of 64 numbers, finer than fp16 around it), or as entries of byte tables, exactly (lut/panel-inl.h), and inputs have the rest.
// Results of int8 are alike in all instruction sets: in fp32, in the order of columns, starting with total = 0,
//
//     total = fma(size_rg * step_ts, float(sum of integers), total)      for every span s of group g, then
//     total = fma(-offset_rg, sum_tg, total)                             where entries have offsets; size and offset of lut/panel-inl.h
//     sum_tg = step_ts * float(sum of integers of x) of its spans, added up in this order
#pragma once
#include <cstdint>
#include <vector>

namespace bitmill {

constexpr int64_t fixed_rows = 16;  // of W, multiplied side by side: a panel
constexpr float fixed_reach = 5792.0f;  // of x times floats
constexpr float fixed_reach_of_bytes = 32767.0f, fixed_reach_of_int8 = 127.0f;  // of x times bytes; 64 * 255 * 32767 < 2^31

// Columns in groups of `group`, each stored in `stored` columns, the last one cut where `columns` ends.
struct FixedShape {
    int64_t columns, group, stored, padded;
    int64_t span;  // columns whose products add up as integers, 64, 32 or 16: it divides `stored` and `padded`
    int64_t step;  // columns that share a step: whole spans of a group, or whole groups
    float reach;
    int bytes;  // of an integer

    int64_t groups() const { return (padded + stored - 1) / stored; }
    int64_t spans() const { return padded / span; }
    int64_t row_bytes() const { return padded * bytes; }
};

FixedShape fixed_shape(int64_t columns);  // of floats
// Of bytes. step: of columns, 0 for the shortest, `columns` or more for one step a row; throws std::invalid_argument if it
// neither consists of whole groups nor divides them into parts of 16 columns or more.
FixedShape fixed_shape(int64_t columns, int64_t group, int64_t stored, int64_t padded, int64_t step, float reach, int bytes);

// Tokens in tiles of about as many each, as many as have their sums in registers. Within a tile, the T tokens' numbers
// alternate, so that they are read in order: four bytes of each, then the next four.
struct FixedInputs {
    FixedShape shape;
    int64_t tokens = 0, tiles = 0;
    std::vector<uint8_t> integers;  // of a tile (row_bytes / 4, T, 4)
    std::vector<float> steps;       // of a tile (spans, T)
    std::vector<int32_t> wholes;    // of a tile (spans, T), sums of integers
    std::vector<float> sums;        // of a tile (groups, T), of the inputs as they are rounded

    int64_t first(int64_t tile) const { return tokens * tile / tiles; }
};

// 16 rows of W.
struct FixedPanel {
    std::vector<uint8_t> integers;  // (row_bytes / 4, 16, 4): four bytes of each row, then the next four
    std::vector<float> steps;       // (groups, 16)
    std::vector<float> offsets;     // (groups, 16), or none
    int32_t bias = 0;               // that the stored integers lack

    void resize(int64_t row_bytes, int64_t groups) {
        integers.resize(fixed_rows * row_bytes), steps.resize(fixed_rows * groups), offsets.resize(fixed_rows * groups);
    }
};

// A tile of inputs: numbers of its tokens, rounded (tokens, columns), or already integers with steps (tokens, row_steps).
struct FixedSource {
    const float* x;
    const int8_t* integers;
    const float* steps;
    int64_t row_steps;
};

// What an instruction set has.
struct FixedKernels {
    int64_t tokens;      // of a tile
    int largest;         // entry of a table that is multiplied in 8 bits
    void (*inputs)(const FixedSource& from, int64_t tile, FixedInputs& out);
    void (*panel)(const FixedShape& shape, const float* W, int64_t count, FixedPanel& out);  // of up to 16 rows
    // A tile of tokens times a panel, of which `count` rows exist, to y (tokens of all tiles, stride).
    void (*product)(const FixedInputs& x, int64_t tile, const FixedPanel& panel, int64_t count, float* y, int64_t stride);
    int64_t (*peak)(int64_t rounds);  // multiplies and adds bytes in registers alone; returns how many products
};

// All tokens of x (tokens, shape.columns).
void fixed_inputs(const FixedShape& shape, const FixedSource& x, int64_t tokens, FixedInputs& out, int threads);
// Products of bytes that all threads add up in registers alone, in `rounds` each: what no matrix product can exceed.
int64_t fixed_peak(int64_t rounds, int threads);
// W (rows, columns) of the shape of the inputs; y (tokens, stride), of which the first `rows` columns are written.
void fixed_product(const FixedInputs& x, const float* W, int64_t rows, float* y, int64_t stride, int threads);

}  // namespace bitmill
