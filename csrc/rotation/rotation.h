// Orthogonal maps as chains of cheap steps on the vector of a token: what numerics/rotations.py makes of a seed.
//
//     multiply      x_i *= numbers[i]
//     permute       x_i = x[order[i]]
//     butterflies   Sylvester's matrix of 2^k along an axis, not normalized, by additions alone
//     matrix        any small matrix along an axis
//
// An axis of a window of x is (outer, order, inner): steps of `inner` between its elements.
#pragma once
#include <cstdint>

namespace bitmill {

enum class Turn : int64_t { multiply, permute, butterflies, matrix };

struct RotationStep {
    Turn turn;
    int64_t start, width;  // of the window
    int64_t order, inner;
    int64_t at;            // where its numbers start; those of a matrix are its transpose, rows padded to 16
};

constexpr int64_t padded_order(int64_t order) { return (order + 15) / 16 * 16; }

struct Rotation {
    int64_t width;
    const RotationStep* steps;
    int64_t count;
    const float* numbers;
    const int32_t* orders;
};

// Kernels of an instruction set: one token, in place, with scratch memory of that size.
struct RotationKernels {
    void (*rotate)(const Rotation&, float* x, float* spare);
};

// x (tokens, width), in place.
void rotate(const Rotation& rotation, float* x, int64_t tokens, int threads);

}  // namespace bitmill
