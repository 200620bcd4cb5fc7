#include "grid.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "../simd/round.h"

namespace bitmill {
namespace {

constexpr float half_max = 65504.0f, half_tiny = 1.0f / (1 << 24), half_normal = 1.0f / (1 << 14);

float nearest(float x) { return x + rounding - rounding; }

// x >= 0 rounded to fp16, within its range; 1 where that is 0: any scale stores zeros.
float stored_scale(float x) {
    x = std::min(x, half_max);
    if (x < half_normal) {
        x = nearest(x / half_tiny) * half_tiny;
        return x > 0 ? x : 1.0f;
    }
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits = (bits + 0xfff + (bits >> 13 & 1)) & ~uint32_t{0x1fff};
    std::memcpy(&x, &bits, 4);
    return x;
}

struct Scale {
    float size, zero;
};

Scale scale_of(const Grid& grid, const float* x, int64_t count) {
    const float top = static_cast<float>((1 << grid.bits) - 1), middle = static_cast<float>(1 << (grid.bits - 1));
    if (grid.scale > 0) return {grid.scale, grid.symmetric ? middle : grid.zero};
    float low = 0, high = 0;
    for (int64_t i = 0; i < count; ++i) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
    }
    if (grid.symmetric) return {stored_scale(2 * std::max(high, -low) / top), middle};
    const float size = stored_scale((high - low) / top);
    return {size, std::min(nearest(-low / size), top)};
}

// Bytes of 255 * high + low; returns the sum of the integers.
template <bool two_bytes>
int32_t round_all(const Grid& grid, const Scale& scale, const float* x, int64_t count, int8_t* to, int8_t* lows) {
    const float least = -scale.zero, most = static_cast<float>((1 << grid.bits) - 1) - scale.zero;
    int32_t sum = 0;
    for (int64_t i = 0; i < count; ++i) {
        const float part = x[i] / scale.size;  // beyond the range of a static scale, up to Inf
        const int32_t whole = static_cast<int32_t>(nearest(part < least ? least : part > most ? most : part));
        sum += whole;
        if (two_bytes) {
            const int32_t high = (whole > 127) - (whole < -127);
            to[i] = static_cast<int8_t>(high), lows[i] = static_cast<int8_t>(whole - 255 * high);
        } else {
            to[i] = static_cast<int8_t>(whole);
        }
    }
    return sum;
}

bool all_finite(const float* x, int64_t count) {
    int32_t most = largest_bits(x, count);
    return most < 0x7f800000;
}

struct Spans {
    int64_t stored, span, count;  // padded columns of a group, of a step; steps of a token
    explicit Spans(const Layout& l)
        : stored(l.group_blocks * l.block_columns()),
          span(step_blocks(l.rows_per_tile, l.group_blocks) * l.block_columns()), count(l.padded_columns() / span) {}
    // Columns [first, last) of step s; none in padding.
    void columns(const Layout& l, int64_t s, int64_t& first, int64_t& last) const {
        const int64_t group = s * span / stored, offset = s * span % stored;
        first = group * l.group + offset;
        last = std::min({first + span, (group + 1) * l.group, l.columns});
    }
};

// Columns in which an input reaches the threshold, into out.kept; returns x without them, or x where there are none.
const float* keep_columns(float threshold, const float* x, int64_t tokens, int64_t columns, Buffers& out) {
    out.kept.clear();
    if (!(threshold > 0)) return x;
    out.rounded.assign(x, x + tokens * columns);
    for (int64_t c = 0; c < columns; ++c) {
        bool kept = false;
        for (int64_t t = 0; t < tokens; ++t) kept |= std::fabs(x[t * columns + c]) >= threshold;
        if (!kept) continue;
        out.kept.push_back(c);
        for (int64_t t = 0; t < tokens; ++t) out.rounded[t * columns + c] = 0.0f;
    }
    return out.kept.empty() ? x : out.rounded.data();
}

// Bytes as 255 * high + low of two bytes from -127 to 127.
void widen(Buffers& out) {
    out.lows = out.bytes;
    for (size_t i = 0; i < out.bytes.size(); ++i) {
        const bool least = out.lows[i] == -128;
        out.bytes[i] = least ? -1 : 0;
        if (least) out.lows[i] = 127;
    }
}

}  // namespace

bool has_grid(const Layout& l, const Grid& grid) {
    if (grid.bits < 1 || grid.bits > 8 || grid.width < 1) return false;
    const Spans spans(l);
    for (int64_t s = 0; s < spans.count; ++s) {
        int64_t first, last;
        spans.columns(l, s, first, last);
        if (first < last && first / grid.width != (last - 1) / grid.width) return false;
    }
    return true;
}

Act read_grid(const Layout& l, const Grid& grid, const float* x, int64_t tokens, bool wide, Buffers& out) {
    const Spans spans(l);
    const int64_t padded = l.padded_columns(), groups = l.padded_groups();
    const bool two_bytes = grid.is_two_bytes();
    const float* rounded = keep_columns(grid.threshold, x, tokens, l.columns, out);
    out.bytes.assign(tokens * padded, 0);
    if (two_bytes) out.lows.assign(tokens * padded, 0);
    out.steps.assign(tokens * spans.count, 0.0f);
    out.sums.assign(tokens * groups, 0.0f);
    bool least = false;
    for (int64_t t = 0; t < tokens; ++t) {
        const float* token = rounded + t * l.columns;
        float *steps = out.steps.data() + t * spans.count, *sums = out.sums.data() + t * groups;
        if (!all_finite(x + t * l.columns, l.columns)) {
            std::fill(steps, steps + spans.count, std::numeric_limits<float>::quiet_NaN());
            std::fill(sums, sums + groups, std::numeric_limits<float>::quiet_NaN());
            continue;
        }
        Scale scale{};
        int64_t scaled = 0;  // columns up to which `scale` is valid
        for (int64_t s = 0; s < spans.count; ++s) {
            int64_t first, last;
            spans.columns(l, s, first, last);
            if (first >= last) continue;
            if (first >= scaled) {
                const int64_t start = first / grid.width * grid.width;
                scaled = std::min(start + std::min(grid.width, l.columns), l.columns);
                scale = scale_of(grid, token + start, scaled - start);
            }
            const int64_t at = t * padded + s * spans.span, count = last - first;
            int8_t* to = out.bytes.data() + at;
            const int32_t sum = two_bytes ? round_all<true>(grid, scale, token + first, count, to, out.lows.data() + at)
                                          : round_all<false>(grid, scale, token + first, count, to, nullptr);
            steps[s] = scale.size;
            sums[s * spans.span / spans.stored] += scale.size * static_cast<float>(sum);
            for (int64_t i = 0; grid.bits == 8 && !two_bytes && i < count; ++i) least |= to[i] == -128;
        }
    }
    wide |= least;
    if (wide && !two_bytes) widen(out);
    wide |= two_bytes;
    out.inputs = {out.bytes.data(), out.lows.data(), out.steps.data(), out.sums.data(), nullptr, padded, spans.count, groups};
    return wide ? Act::int16 : Act::int8;
}

}  // namespace bitmill
