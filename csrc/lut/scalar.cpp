// The kernels in plain C++ for every width: the reference of the vector kernels' tests, and the fallback. Loops go over the 64 bytes of a block, so that compilers can vectorize them for any machine.
#include "../simd/scalar.h"
#include "../fixed/fixed.h"
#include "linear.h"

namespace bitmill {
namespace {

// The table entries of 64 codes. A record holds one table, or one for every row of the tile: see choose.h and simd/.
struct Tables {
    const Weights& w;
    const int R = w.layout.rows_per_tile, bits = w.layout.bits;

    int place(int lane, int code) const {  // within a record
        if (w.source == Source::shared || R == 1) return code;
        return R == 4 ? lane / 16 * (w.mirrored ? 8 : 16) + code : code / 4 * 64 + lane / 4 * 4 + code % 4;
    }

    int64_t record(int64_t tile, int64_t group) const {
        return w.records_per_tile ? tile * w.records_per_tile + (w.records_per_tile > 1 ? group : 0) : 0;
    }

    // The level of a code of lane l, which belongs to row l * R / 64 of its tile.
    float entry(int64_t tile, int64_t group, int l, int code, float) const {  // rows' fp32 tables follow each other
        const float* tables = reinterpret_cast<const float*>(w.tables);
        int64_t table = 0;
        if (w.source == Source::own) table = record(tile, group) * (float_record(bits, R, w.source) >> bits) + l * R / 64;
        if (w.source == Source::bank) table = id(tile, group, l) & ((1 << w.bank_bits) - 1);
        return tables[(table << bits) + code];
    }

    int32_t entry(int64_t tile, int64_t group, int l, int code, int32_t) const {
        if (w.source == Source::bank) {
            const int table = id(tile, group, l) & ((1 << w.bank_bits) - 1);
            const auto word = [&](int i) { return w.tables[i / 4 * 128 + 4 * table + i % 4]; };
            if (w.summed()) return word(code % 4) + word(4 + code / 4);
            return bits == 4 ? w.tables[16 * table + code] : word(code);
        }
        const uint8_t* low = w.tables + record(tile, group) * w.record_bytes;
        const uint8_t* high = low + w.record_bytes / 2;
        const bool turned = w.mirrored && code >> (bits - 1);
        const int at = place(l, turned ? code ^ ((1 << bits) - 1) : code);
        const int32_t value = low[at] + (w.wide ? high[at] << 8 : 0);
        return turned ? (w.wide ? 65535 : 255) - value : value;
    }

    int id(int64_t tile, int64_t group, int l) const { return w.ids[(tile * w.layout.padded_groups() + group) * R + l * R / 64]; }

    template <class Value>
    void look(int64_t tile, int64_t group, const uint8_t* codes, Value* values) const {
        for (int l = 0; l < 64; ++l) values[l] = entry(tile, group, l, codes[l], Value{});
    }
};

float scale_of(const Weights& w, int64_t at) {
    if (w.wide_scales) return static_cast<const float*>(w.scales)[at];
    return w.scales ? from_half(static_cast<const uint16_t*>(w.scales)[at]) : 1.0f;
}

float zero_of(const Weights& w, int64_t at) {
    switch (w.zero_kind) {
        case Zero::bytes: return static_cast<const uint8_t*>(w.zeros)[at];
        case Zero::halves: return from_half(static_cast<const uint16_t*>(w.zeros)[at]);
        default: return w.zero;
    }
}

float group_scale(const Weights& w, int64_t at) {
    return w.source == Source::bank ? w.powers[w.ids[at] >> w.bank_bits] : scale_of(w, at);
}

template <Act act>
void tiles(const Weights& w, const Inputs& in, float* y, int64_t, int64_t first, int64_t last) {
    const Layout& layout = w.layout;
    const Tables tables{w};
    const int R = layout.rows_per_tile, F = layout.group_blocks, S = step_blocks(R, F), width = 64 / R;
    const int64_t blocks = layout.chunks() * 8, groups = layout.padded_groups();
    using Value = std::conditional_t<act == Act::float32, float, int32_t>;
    using Sum = std::conditional_t<act == Act::float32, float, int64_t>;
    uint8_t codes[64];
    Value values[64];
    for (int64_t tile = first; tile < last; ++tile) {
        float total[16] = {}, part[16] = {};
        Sum whole[16] = {};
        const uint8_t* stored = w.codes + tile * layout.tile_bytes();
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t group = b / F;
            unpack_block(stored + b / 8 * 64 * layout.bits, layout.bits, static_cast<int>(b % 8), codes);
            tables.look(tile, group, codes, values);
            Value x[64];
            for (int c = 0; c < width; ++c) {
                const int64_t at = b * width + c;
                if constexpr (act == Act::float32) x[c] = in.floats[at];
                else x[c] = act == Act::int8 ? in.bytes[at] : 255 * in.bytes[at] + in.lows[at];
            }
            for (int r = 0; r < R; ++r)
                for (int c = 0; c < width; ++c) whole[r] += static_cast<Sum>(values[r * width + c]) * x[c];
            if ((b + 1) % S == 0)
                for (int r = 0; r < R; ++r) {
                    part[r] += (act == Act::float32 ? 1.0f : in.steps[b / S]) * static_cast<float>(whole[r]);
                    whole[r] = 0;
                }
            if ((b + 1) % F && b + 1 < blocks) continue;
            for (int r = 0; r < R; ++r) {
                const int64_t at = (tile * groups + group) * R + r;
                total[r] += group_scale(w, at) * (part[r] - zero_of(w, at) * in.sums[group]);
                part[r] = 0;
            }
        }
        for (int r = 0; r < R && tile * R + r < layout.rows; ++r) y[tile * R + r] = total[r] * w.row_scales[tile * R + r];
    }
}

Kernel choose_scalar(const Weights&, Act act, int tokens) {
    if (tokens > 1) return nullptr;
    return act == Act::int8 ? tiles<Act::int8> : tiles<Act::int16>;
}

Kernel choose_floats(const Weights&) { return tiles<Act::float32>; }

// 16 rows for many tokens, as lut/panel-inl.h.
void panel_of(const Weights& w, int64_t panel, int bytes, FixedPanel& out) {
    const Layout& l = w.layout;
    const Tables tables{w};
    const int64_t R = l.rows_per_tile, width = l.block_columns(), groups = l.padded_groups(), each = 4 / bytes;
    out.resize(l.padded_columns() * bytes, groups);
    uint8_t codes[64];
    int32_t entries[64];
    for (int64_t row = 0; row < fixed_rows && panel * fixed_rows + row < l.tiles() * R; row += R) {
        const int64_t tile = (panel * fixed_rows + row) / R;
        for (int64_t i = 0; i < groups * R; ++i) {
            const int64_t at = tile * groups * R + i, to = i / R * fixed_rows + row + i % R;
            out.steps[to] = w.row_scales[tile * R + i % R] * group_scale(w, at), out.offsets[to] = out.steps[to] * zero_of(w, at);
        }
        for (int64_t b = 0; b < l.chunks() * 8; ++b) {
            unpack_block(w.codes + tile * l.tile_bytes() + b / 8 * 64 * l.bits, l.bits, static_cast<int>(b % 8), codes);
            tables.look(tile, b / l.group_blocks, codes, entries);
            for (int64_t i = 0; i < 64; ++i) {
                const int64_t c = b * width + i % width;
                uint8_t* to = out.integers.data() + (c / each * fixed_rows + row + i / width) * 4 + c % each * bytes;
                to[0] = static_cast<uint8_t>(entries[i]);
                if (bytes == 2) to[1] = 0;  // entries are bytes
            }
        }
    }
}

}  // namespace

void lookup_row(const Weights& w, Act act, int64_t row, float* out) {
    const Layout& l = w.layout;
    const Tables tables{w};
    const int64_t tile = row / l.rows_per_tile, within = row % l.rows_per_tile;
    const int lane = static_cast<int>(within * l.block_columns());
    std::vector<uint8_t> codes(l.columns);
    gather_rows(l, w.codes, &row, 1, codes.data(), 1);
    for (int64_t g = 0; g < l.groups(); ++g) {
        const int64_t at = (tile * l.padded_groups() + g) * l.rows_per_tile + within;
        const float scale = w.row_scales[row] * group_scale(w, at), zero = zero_of(w, at);
        for (int64_t c = g * l.group; c < l.columns && c < (g + 1) * l.group; ++c) {
            const float level = act == Act::float32 ? tables.entry(tile, g, lane, codes[c], 0.0f)
                                                    : static_cast<float>(tables.entry(tile, g, lane, codes[c], 0));
            out[c] = scale * (level - zero);
        }
    }
}

void lookup_columns(const Weights& w, Act act, const int64_t* columns, int64_t count, int64_t first, int64_t last, float* out) {
    const Layout& l = w.layout;
    const Tables tables{w};
    const int64_t R = l.rows_per_tile, width = l.block_columns();
    uint8_t codes[64];
    for (int64_t tile = first; tile < last; ++tile) {
        const int64_t rows = std::min(R, l.rows - tile * R);
        float* to = out + (tile - first) * R * count;
        int64_t unpacked = -1;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t group = columns[i] / l.group, place = group * l.group_blocks * width + columns[i] % l.group;
            const int64_t block = place / width;
            if (block != unpacked) {  // columns that follow each other are often of one block
                const uint8_t* stored = w.codes + tile * l.tile_bytes() + block / 8 * 64 * l.bits;
                unpack_block(stored, l.bits, static_cast<int>(block % 8), codes);
                unpacked = block;
            }
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t at = (tile * l.padded_groups() + group) * R + r;
                const int lane = static_cast<int>(r * width + place % width);
                const float level = act == Act::float32 ? tables.entry(tile, group, lane, codes[lane], 0.0f)
                                                        : static_cast<float>(tables.entry(tile, group, lane, codes[lane], 0));
                to[r * count + i] = w.row_scales[tile * R + r] * group_scale(w, at) * (level - zero_of(w, at));
            }
        }
    }
}

void add_columns(const Weights& w, Act act, const std::vector<int64_t>& columns, const float* x, int64_t tokens, float* y,
                 int64_t first, int64_t last) {
    const int64_t R = w.layout.rows_per_tile, count = static_cast<int64_t>(columns.size());
    if (!count) return;
    thread_local std::vector<float> weights;
    weights.resize(R * count);
    for (int64_t tile = first; tile < last; ++tile) {
        lookup_columns(w, act, columns.data(), count, tile, tile + 1, weights.data());
        for (int64_t r = 0; r < R && tile * R + r < w.layout.rows; ++r)
            for (int64_t t = 0; t < tokens; ++t) {
                float sum = 0;
                for (int64_t i = 0; i < count; ++i) sum += weights[r * count + i] * x[t * w.layout.columns + columns[i]];
                y[t * w.layout.rows + tile * R + r] += sum;
            }
    }
}

const LookupKernels scalar_lookup = {choose_scalar, choose_floats, [](const Weights& w) { return w.wide ? nullptr : panel_of; }};

}  // namespace bitmill
