// Steps of the solvers that take most of their time: rounding columns in turn to tables of levels, and choosing a coding.
//
// Plain loops over rows, which are independent: every instruction set and any number of threads gives the same bytes.
#pragma once
#include <cstdint>

namespace bitmill {

// Columns that are rounded one after another. Matrices are (columns, rows); tables hold one entry for each row.
struct Columns {
    int64_t count, rows;
    int levels;
    const float* table;    // (groups, levels, rows), ascending
    const float* middles;  // (groups, levels - 1, rows), between the levels
    const uint8_t* codes;  // (groups, levels, rows), of the levels
    const int32_t* group;  // (count): of each column
};

// Error feedback within the columns: each takes U[k, l] / U[k, k] of the errors of those before it.
struct Feedback {
    const float* U;  // (count, stride)
    int64_t stride;
    float* W;        // (count, rows): values, replaced by the levels
    uint8_t* codes;  // (count, rows)
    float* errors;   // (count, rows), divided by U[k, k]
};

// Coordinate descent within the columns: each moves to the level that is best with all others as they are.
struct Descend {
    const float* H;       // (count, count)
    const int64_t* place;  // (count): of each column in Q and codes
    float* gradient;      // (count, rows), kept up to date
    float* Q;             // (all columns, rows)
    uint8_t* codes;       // (all columns, rows)
    float* moved;         // (count, rows)
};

// Codings of groups of columns on a grid of half-integer bins: formats/integer_coding.py.
struct Codings {
    int64_t count, width;    // groups, and their columns
    const float* x;          // (count, width)
    const float* weight;     // (weights, width), of group n % weights
    int64_t weights;
    const float* factor;     // (count)
    const float* costs;      // (2 * bins, codings): of mass and of moment
    int bins, codings;
    float* least;            // (count)
    int64_t* coding;         // (count)
};

struct SolveKernels {  // for rows or groups [first, last)
    void (*feedback)(const Columns&, const Feedback&, int64_t first, int64_t last);
    void (*descend)(const Columns&, const Descend&, int64_t first, int64_t last);
    void (*codings)(const Codings&, int64_t first, int64_t last);
};

void round_with_feedback(const Columns& columns, const Feedback& feedback, int threads);
void round_by_descent(const Columns& columns, const Descend& descend, int threads);
void cheapest_codings(const Codings& codings, int threads);

}  // namespace bitmill
