// Y = X W^T of many tokens by integers of 16 bits, which multiply twice as fast as fp32: every span of up to 64 columns
// has a step for each token and each row of W, and its products sum up exactly in 32 bits.
//
//     y_tr = sum over spans of step_ts * step_rs * (sum of integers of x times those of w) - offset_rg * sum of x_tg
//
// W comes as floats, whose integers reach as far as those of x (64 * 5792^2 < 2^31: half a step is 1/11584 of the largest
// of 64 numbers, finer than fp16 around it), or as entries of byte tables, exactly (lut/panel-inl.h), and inputs have the rest.
#pragma once
#include <cstdint>
#include <vector>

namespace bitmill {

constexpr int64_t fixed_rows = 16;  // of W, multiplied side by side: a panel
constexpr float fixed_reach = 5792.0f, fixed_reach_of_bytes = 32767.0f;  // of x; 64 * 255 * 32767 < 2^31

// Columns in groups of `group`, each stored in `stored` columns, the last one cut where `columns` ends.
struct FixedShape {
    int64_t columns, group, stored, padded;
    int64_t span;  // columns that share a step, 64, 32 or 16: it divides `stored` and `padded`
    float reach;

    int64_t groups() const { return (padded + stored - 1) / stored; }
    int64_t spans() const { return padded / span; }
};

FixedShape fixed_shape(int64_t columns);  // of floats
FixedShape fixed_shape(int64_t columns, int64_t group, int64_t stored, int64_t padded);  // of bytes

struct FixedInputs {
    FixedShape shape;
    int64_t tokens = 0;
    std::vector<int16_t> integers;  // (tokens, padded)
    std::vector<float> steps;       // (tokens, spans)
    std::vector<float> sums;        // (tokens, groups), of the inputs as they are rounded
};

// 16 rows of W.
struct FixedPanel {
    std::vector<int16_t> integers;  // (padded / 2, 16, 2): two columns of each row, then the next two
    std::vector<float> steps;       // (groups, 16)
    std::vector<float> offsets;     // (groups, 16), or none
};

// What an instruction set has.
struct FixedKernels {
    void (*inputs)(const FixedShape& shape, const float* x, float* spare, int16_t* integers, float* steps, float* sums);  // of one token
    void (*panel)(const FixedShape& shape, const float* W, int64_t count, FixedPanel& out);  // of up to 16 rows
    // All tokens times a panel, of which `count` rows exist, to y (tokens, stride).
    void (*product)(const FixedInputs& x, const FixedPanel& panel, int64_t count, float* y, int64_t stride);
};

// x (tokens, shape.columns).
void fixed_inputs(const FixedShape& shape, const float* x, int64_t tokens, FixedInputs& out, int threads);
// W (rows, columns) of the shape of the inputs; y (tokens, stride), of which the first `rows` columns are written.
void fixed_product(const FixedInputs& x, const float* W, int64_t rows, float* y, int64_t stride, int threads);

}  // namespace bitmill
