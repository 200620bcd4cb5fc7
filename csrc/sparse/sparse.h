// y += x S^T for a matrix S of few entries, row by row.
#pragma once
#include <cstdint>

namespace bitmill {

struct Sparse {
    int64_t rows, columns;
    const int64_t* starts;   // (rows + 1,): where each row's entries are
    const void* places;      // columns, uint16 or, `wide`, uint32
    bool wide;
    const uint16_t* values;  // fp16
};

// What an instruction set has, for rows [first, last).
struct SparseKernels {
    void (*add)(const Sparse&, const float* x, int64_t tokens, float* y, int64_t first, int64_t last);
};

// x (tokens, columns), y (tokens, rows). Each row belongs to one thread: no two threads add to one output.
void sparse_add(const Sparse& entries, const float* x, int64_t tokens, float* y, int threads);

}  // namespace bitmill
