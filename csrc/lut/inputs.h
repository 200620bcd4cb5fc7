// Inputs as the kernels want them: padded to whole chunks, and integers with a step for every few columns.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernel.h"

namespace bitmill {

struct Buffers {
    std::vector<float> padded, steps, sums;
    std::vector<int8_t> bytes, lows;
    Inputs inputs{};
};

// |x| as integers, which order like the numbers; what is not finite is larger than all that is.
inline int32_t largest_bits(const float* x, int64_t count) {
    int32_t most = 0;
    for (int64_t i = 0; i < count; ++i) {
        int32_t bits;
        std::memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    return most;
}

// One step: x ~ step * integer, |integer| <= reach. Returns step * (sum of integers).
template <Act act>
float integers(const float* x, int64_t count, int8_t* bytes, int8_t* lows, float* step) {
    constexpr float reach = act == Act::int8 ? 127.0f : 32512.0f;  // 255 * 127 + 127
    const int32_t bits = largest_bits(x, count);
    float most;
    std::memcpy(&most, &bits, 4);
    const bool finite = bits < 0x7f800000;
    *step = finite ? most / reach : __builtin_nanf("");  // NaN and infinities become NaN in every output
    const float per_step = finite && *step > 0 ? 1.0f / *step : 0.0f;
    constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to nearest, ties to even
    int32_t sum = 0;
    for (int64_t i = 0; i < count; ++i) {
        const float scaled = finite ? x[i] * per_step : 0.0f;
        if (act == Act::int8) {
            const int32_t n = static_cast<int32_t>((scaled + magic) - magic);
            bytes[i] = static_cast<int8_t>(n);
            sum += n;
        } else {
            const float whole = (scaled + magic) - magic, high = (whole * (1.0f / 255.0f) + magic) - magic;
            bytes[i] = static_cast<int8_t>(static_cast<int32_t>(high));
            lows[i] = static_cast<int8_t>(static_cast<int32_t>(whole - 255.0f * high));
            sum += static_cast<int32_t>(whole);
        }
    }
    return *step * static_cast<float>(sum);
}

// x (tokens, layout.columns) into `out`, which it sizes. V only says with which instructions.
template <class V>
void read_inputs(const Layout& layout, const float* x, int64_t tokens, Act act, Buffers& out) {
    const int64_t columns = layout.padded_columns(), groups = layout.padded_groups(), width = layout.block_columns();
    const int64_t span = step_blocks(layout.rows_per_tile, layout.group_blocks) * width, steps = columns / span;
    const int64_t stored = layout.group_blocks * width;  // columns of a group, padding included
    out.padded.assign(columns, 0.0f);
    out.sums.assign(tokens * groups, 0.0f);
    out.steps.resize(tokens * steps);
    out.bytes.resize(tokens * columns);
    if (act == Act::int16) out.lows.resize(tokens * columns);
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t g = 0; g < layout.groups(); ++g) {
            const int64_t first = g * layout.group;
            const int64_t count = first + layout.group < layout.columns ? layout.group : layout.columns - first;
            std::memcpy(out.padded.data() + g * stored, x + t * layout.columns + first, count * sizeof(float));
        }
        float* sums = out.sums.data() + t * groups;
        for (int64_t s = 0; s < steps; ++s) {
            const float* from = out.padded.data() + s * span;
            int8_t* bytes = out.bytes.data() + t * columns + s * span;
            float* step = out.steps.data() + t * steps + s;
            sums[s * span / stored] +=
                act == Act::int8 ? integers<Act::int8>(from, span, bytes, nullptr, step)
                                 : integers<Act::int16>(from, span, bytes, out.lows.data() + (bytes - out.bytes.data()), step);
        }
    }
    out.inputs = {out.bytes.data(), out.lows.data(), out.steps.data(), out.sums.data(),
                  columns, steps, groups};
}

}  // namespace bitmill
