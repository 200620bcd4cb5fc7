// Numbers as integers times a step that they share.
#pragma once
#include <cstdint>
#include <cstring>

#include "inline.h"

namespace bitmill {

constexpr float rounding = 12582912.0f;  // 1.5 * 2^23: adding it rounds to nearest, ties to even

struct Step {
    float size;      // NaN where a number is not finite: it becomes NaN in every output
    float per_unit;  // 1 / size; 0 where all numbers become 0

    BITMILL_INLINE float whole(float x) const { return (per_unit > 0 ? x * per_unit : 0.0f) + rounding - rounding; }
    BITMILL_INLINE int32_t integer(float x) const { return static_cast<int32_t>(whole(x)); }
};

// |x| as integers order like the numbers; what is not finite is larger than all that is.
BITMILL_INLINE int32_t largest_bits(const float* x, int64_t count) {
    int32_t most = 0;
    for (int64_t i = 0; i < count; ++i) {
        int32_t bits;
        std::memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    return most;
}

// x ~ size * integer with |integer| <= reach.
BITMILL_INLINE Step step_of(const float* x, int64_t count, float reach) {
    const int32_t bits = largest_bits(x, count);
    float most;
    std::memcpy(&most, &bits, 4);
    if (bits >= 0x7f800000) return {__builtin_nanf(""), 0.0f};
    const float size = most / reach;
    return {size, size > 1e-37f ? 1.0f / size : 0.0f};  // which is finite
}

}  // namespace bitmill
