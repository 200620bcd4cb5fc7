// Panels for products of many tokens (fixed/fixed.h) from codes and byte tables, for an instruction set V: entries are
// looked up as for one token, and are the integers.
//
//     size_rg = row_scale_r * scale_rg        offset_rg = size_rg * zero_rg        in fp32
#pragma once
#include "../fixed/fixed.h"
#include "lookup-inl.h"

namespace bitmill {

// A tile of R rows of a panel.
template <class V, int bits, int R, Source source>
struct PanelTile {
    static constexpr int C = 64 / R;
    static constexpr bool whole = source == Source::shared || R == 1, summed = bits == 4 && R == 16;
    using Look = std::conditional_t<whole, typename V::template Whole<bits>,
                                    std::conditional_t<summed, typename V::Sums, typename V::template Lanes<bits>>>;
    static constexpr int less = source == Source::bank ? 0 : V::bias;   // of what is looked up
    static constexpr int stored_less = V::Quads::biased ? less : 0;  // and of what is stored in 8 bits
    const Weights& w;
    const int64_t tile, row;  // row: of the panel, where the tile starts
    const int bytes;
    FixedPanel& out;
    const int64_t groups = w.layout.padded_groups();
    const int F = w.layout.group_blocks < 8 ? w.layout.group_blocks : 8;
    int64_t group = 0;
    Look look{};

    BITMILL_INLINE int64_t place() const { return (tile * groups + group) * R; }

    BITMILL_INLINE void load(const uint8_t* record) {
        if constexpr (source == Source::own && !whole && bits >= 3) {
            if (w.mirrored) return look.load_mirrored(record);
        }
        look.load(record);
    }

    BITMILL_INLINE void put(std::vector<float>& to, typename V::Floats numbers) const {
        float lanes[16];
        V::store(lanes, numbers);
        for (int r = 0; r < R; ++r) to[group * fixed_rows + row + r] = lanes[r * (16 / R)];
    }

    // Sizes and offsets of a group, and the tables of its rows.
    BITMILL_INLINE void begin_group() {
        auto size = V::template rows<R>(w.row_scales + tile * R);
        if constexpr (source == Source::bank) {
            const uint8_t* ids = w.ids + place();
            look.from_bank(ids, (1 << w.bank_bits) - 1);
            size = V::mul(size, V::template named<R>(w.powers, ids, w.bank_bits));
        } else {
            if (source == Source::own && w.records_per_tile > 1) load(w.tables + place() / R * w.record_bytes);
            if (w.wide_scales) size = V::mul(size, V::template rows<R>(static_cast<const float*>(w.scales) + place()));
            else if (w.scales) size = V::mul(size, V::template rows<R>(static_cast<const uint16_t*>(w.scales) + place()));
        }
        auto zero = V::all(w.zero);
        if (w.zero_kind == Zero::bytes) zero = V::template rows<R>(static_cast<const uint8_t*>(w.zeros) + place());
        else if (w.zero_kind == Zero::halves) zero = V::template rows<R>(static_cast<const uint16_t*>(w.zeros) + place());
        put(out.steps, size), put(out.offsets, V::mul(size, zero));
        ++group;
    }

    // A block of R rows and C columns, into words of four bytes of each row of the panel.
    BITMILL_INLINE void store(typename V::Bytes entries, uint8_t*& to) const {
        if (R == 16 && bytes == 1) {
            V::template store_bytes<less - stored_less>(to, entries);
        } else if (R == 16) {
            V::template store_pairs<less>(to, entries);
        } else if (bytes == 1) {
            uint8_t found[64];
            V::template store_bytes<less - stored_less>(found, entries);
            for (int r = 0; r < R; ++r)
                for (int c = 0; c < C; c += 4) std::memcpy(to + 16 * c + 4 * (row + r), found + r * C + c, 4);
        } else {
            uint8_t found[64];
            V::template store_bytes<less>(found, entries);
            for (int r = 0; r < R; ++r)
                for (int c = 0; c < C; c += 2) {
                    const int16_t two[2] = {found[r * C + c], found[r * C + c + 1]};
                    std::memcpy(to + 32 * c + 4 * (row + r), two, 4);
                }
        }
        to += fixed_rows * C * bytes;
    }

    template <int i>
    BITMILL_INLINE void block(const uint8_t* codes, uint8_t*& to) {
        store(entries_of<V, bits, i, whole>(look, codes), to);
        if constexpr (i == 3 || (R == 4 && i % 2 == 1 && i < 7)) {  // where groups of less than a chunk may end
            if (((i + 1) & (F - 1)) == 0) begin_group();
        }
    }

    template <int... i>
    BITMILL_INLINE void chunk(std::integer_sequence<int, i...>, const uint8_t* codes, uint8_t*& to) {
        (block<i>(codes, to), ...);
    }

    BITMILL_INLINE void run() {
        const int64_t chunks = w.layout.chunks(), in_group = w.layout.group_blocks < 8 ? 1 : w.layout.group_blocks / 8;
        const uint8_t* codes = w.codes + tile * w.layout.tile_bytes();
        uint8_t* to = out.integers.data();
        if constexpr (source == Source::bank) look.hold_bank(w.tables);
        else load(w.tables + tile * w.records_per_tile * w.record_bytes);
        for (int64_t c = 0; c < chunks; ++c, codes += 64 * bits) {
            if (c % in_group == 0) begin_group();
            chunk(std::make_integer_sequence<int, 8>{}, codes, to);
        }
    }
};

template <class V, int bits, int R, Source source>
void panel_of(const Weights& w, int64_t panel, int bytes, FixedPanel& out) {
    using Tile = PanelTile<V, bits, R, source>;
    out.resize(w.layout.padded_columns() * bytes, w.layout.padded_groups());
    out.bias = Tile::stored_less;
    constexpr int64_t tiles = fixed_rows / R;
    for (int64_t i = 0; i < tiles && panel * tiles + i < w.layout.tiles(); ++i)
        Tile{w, panel * tiles + i, i * R, bytes, out}.run();
}

// The panel kernel for some weights, or null: tables of bytes.
template <class V, int bits = 1>
PanelKernel choose_panel(const Weights& w) {
    if (w.layout.bits != bits) {
        if constexpr (bits < 8) return choose_panel<V, bits + 1>(w);
        else return nullptr;
    }
    constexpr int R = bits < 4 ? 16 : bits == 4 ? 4 : 1;
    if (w.wide) return nullptr;
    if (w.source == Source::shared) return panel_of<V, bits, 16, Source::shared>;
    if (w.source == Source::own) return panel_of<V, bits, R, Source::own>;
    if constexpr (bits == 4) {
        if (w.summed()) return panel_of<V, bits, 16, Source::bank>;
    }
    if constexpr (bits <= 4) return panel_of<V, bits, R, Source::bank>;
    return nullptr;
}

}  // namespace bitmill
