// Inputs for the lookup kernels: padded to whole chunks, and integers with a step for every few columns.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

#include "../simd/inline.h"
#include "../simd/round.h"
#include "lookup.h"

namespace bitmill {

// One step: x ~ step * integer, |integer| <= reach. Returns step * (sum of integers).
template <Act act>
BITMILL_INLINE float integers(const float* x, int64_t count, int8_t* bytes, int8_t* lows, float* step) {
    constexpr float reach = act == Act::int8 ? 127.0f : 32512.0f;  // 255 * 127 + 127
    const Step units = step_of(x, count, reach);
    *step = units.size;
    int32_t sum = 0;
    for (int64_t i = 0; i < count; ++i) {
        const float whole = units.whole(x[i]);
        sum += static_cast<int32_t>(whole);
        if (act == Act::int8) {
            bytes[i] = static_cast<int8_t>(static_cast<int32_t>(whole));
        } else {
            const float high = (whole * (1.0f / 255.0f) + rounding) - rounding;
            bytes[i] = static_cast<int8_t>(static_cast<int32_t>(high));
            lows[i] = static_cast<int8_t>(static_cast<int32_t>(whole - 255.0f * high));
        }
    }
    return *step * static_cast<float>(sum);
}

// x (tokens, layout.columns) into `out`, which it sizes. V selects the instructions only.
template <class V>
void read_inputs(const Layout& layout, const float* x, int64_t tokens, Act act, Buffers& out) {
    const int64_t columns = layout.padded_columns(), groups = layout.padded_groups(), width = layout.block_columns();
    const int64_t span = step_blocks(layout.rows_per_tile, layout.group_blocks) * width, steps = columns / span;
    const int64_t stored = layout.group_blocks * width;  // columns of a group, padding included
    out.padded.assign(act == Act::float32 ? tokens * columns : columns, 0.0f);
    out.sums.assign(tokens * groups, 0.0f);
    if (act != Act::float32) {
        out.steps.resize(tokens * steps);
        out.bytes.resize(tokens * columns);
    }
    if (act == Act::int16) out.lows.resize(tokens * columns);
    for (int64_t t = 0; t < tokens; ++t) {
        float* padded = out.padded.data() + (act == Act::float32 ? t * columns : 0);
        for (int64_t g = 0; g < layout.groups(); ++g) {
            const int64_t first = g * layout.group;
            const int64_t count = first + layout.group < layout.columns ? layout.group : layout.columns - first;
            std::memcpy(padded + g * stored, x + t * layout.columns + first, count * sizeof(float));
        }
        float* sums = out.sums.data() + t * groups;
        if (act == Act::float32) {
            for (int64_t i = 0; i < columns; ++i) sums[i / stored] += padded[i];
            continue;
        }
        for (int64_t s = 0; s < steps; ++s) {
            const float* from = padded + s * span;
            int8_t* bytes = out.bytes.data() + t * columns + s * span;
            float* step = out.steps.data() + t * steps + s;
            sums[s * span / stored] +=
                act == Act::int8 ? integers<Act::int8>(from, span, bytes, nullptr, step)
                                 : integers<Act::int16>(from, span, bytes, out.lows.data() + (bytes - out.bytes.data()), step);
        }
    }
    out.inputs = {out.bytes.data(), out.lows.data(), out.steps.data(), out.sums.data(),
                  out.padded.data(), columns, steps, groups};
}

}  // namespace bitmill
