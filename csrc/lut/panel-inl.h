// Panels for products of many tokens (fixed/fixed.h) from codes and byte tables, for an instruction set V: entries are
// looked up as for one token, and are the integers.
#pragma once
#include "../fixed/fixed.h"
#include "lookup-inl.h"

namespace bitmill {

// Tiles of 16 rows, whose blocks have four columns: a block becomes two pairs of columns.
template <class V, int bits, Source source>
struct PanelOf {
    static constexpr bool summed = bits == 4 && source == Source::bank;
    using Look = std::conditional_t<source == Source::shared, typename V::template Whole<bits>,
                                    std::conditional_t<summed, typename V::Sums, typename V::template Lanes<bits>>>;
    const Weights& w;
    const int64_t tile;
    FixedPanel& out;
    const int64_t groups = w.layout.padded_groups();
    int64_t group = 0;
    Look look{};

    BITMILL_INLINE int64_t place() const { return (tile * groups + group) * fixed_rows; }

    BITMILL_INLINE void load(const uint8_t* record) {
        if constexpr (source == Source::own && bits == 3) {
            if (w.mirrored) return look.load_mirrored(record);
        }
        look.load(record);
    }

    // Steps and offsets of a group, and the tables of its rows.
    BITMILL_INLINE void begin_group() {
        if constexpr (source == Source::bank) look.from_bank(w.ids + place(), (1 << w.bank_bits) - 1);
        else if (source == Source::own && w.records_per_tile > 1) load(w.tables + place() / fixed_rows * w.record_bytes);
        for (int64_t r = 0; r < fixed_rows; ++r) {
            const int64_t at = group * fixed_rows + r;
            float scale = 1.0f;
            if constexpr (source == Source::bank) scale = w.powers[w.ids[place() + r] >> w.bank_bits];
            out.steps[at] = w.row_scales[tile * fixed_rows + r] * scale;
        }
        float* steps = out.steps.data() + group * fixed_rows;
        auto scale = V::template rows<16>(steps);
        if (source == Source::bank) {}  // which has no more than its powers
        else if (w.wide_scales) scale = V::mul(scale, V::template rows<16>(static_cast<const float*>(w.scales) + place()));
        else if (w.scales) scale = V::mul(scale, V::template rows<16>(static_cast<const uint16_t*>(w.scales) + place()));
        auto zero = V::all(w.zero);
        if (w.zero_kind == Zero::bytes) zero = V::template rows<16>(static_cast<const uint8_t*>(w.zeros) + place());
        else if (w.zero_kind == Zero::halves) zero = V::template rows<16>(static_cast<const uint16_t*>(w.zeros) + place());
        V::store(steps, scale);
        V::store(out.offsets.data() + group * fixed_rows, V::mul(scale, zero));
        ++group;
    }

    template <int i>
    BITMILL_INLINE void block(const uint8_t* codes, uint8_t*& to) {
        constexpr int less = source == Source::bank ? 0 : V::bias;
        V::template store_pairs<less>(to, entries_of<V, bits, i, source == Source::shared>(look, codes));
        to += 128;
        if constexpr (i == 3) {
            if (w.layout.group_blocks == 4) begin_group();
        }
    }

    template <int... i>
    BITMILL_INLINE void chunk(std::integer_sequence<int, i...>, const uint8_t* codes, uint8_t*& to) {
        (block<i>(codes, to), ...);
    }

    BITMILL_INLINE void run() {
        const int64_t chunks = w.layout.chunks(), in_group = w.layout.group_blocks < 8 ? 1 : w.layout.group_blocks / 8;
        out.integers.resize(fixed_rows * w.layout.padded_columns());
        out.steps.resize(fixed_rows * groups), out.offsets.resize(fixed_rows * groups);
        const uint8_t* codes = w.codes + tile * w.layout.tile_bytes();
        uint8_t* to = reinterpret_cast<uint8_t*>(out.integers.data());
        if constexpr (source == Source::bank) look.hold_bank(w.tables);
        else load(w.tables + tile * w.records_per_tile * w.record_bytes);
        for (int64_t c = 0; c < chunks; ++c, codes += 64 * bits) {
            if (c % in_group == 0) begin_group();
            chunk(std::make_integer_sequence<int, 8>{}, codes, to);
        }
    }
};

template <class V, int bits, Source source>
void panel_of(const Weights& w, int64_t tile, FixedPanel& out) {
    PanelOf<V, bits, source>{w, tile, out}.run();
}

// The panel kernel for some weights, or null: tiles of 16 rows with tables of bytes.
template <class V, int bits = 1>
PanelKernel choose_panel(const Weights& w) {
    if (w.layout.bits != bits) {
        if constexpr (bits < 8) return choose_panel<V, bits + 1>(w);
        else return nullptr;
    }
    if (w.wide || w.layout.rows_per_tile != fixed_rows) return nullptr;
    if (w.source == Source::shared) return panel_of<V, bits, Source::shared>;
    if constexpr (bits < 4) {
        if (w.source == Source::own) return panel_of<V, bits, Source::own>;
    }
    if constexpr (bits <= 4) {
        if (w.source == Source::bank) return panel_of<V, bits, Source::bank>;
    }
    return nullptr;
}

}  // namespace bitmill
