// W^ in floats from codes of the layout, for products of many tokens. For an instruction set V.
#pragma once
#include <cstring>
#include <utility>

#include "codes-inl.h"
#include "layout.h"
#include "levels.h"

namespace bitmill {

// The codes of one tile, one byte each, (rows of the tile, padded columns).
template <class V, int bits>
struct Unpacked {
    const Layout& layout;
    uint8_t* codes;

    template <int i>
    BITMILL_INLINE void block(const uint8_t* chunk, int64_t at) const {
        constexpr uint64_t mask = uint64_t{0x0101010101010101} * ((1u << bits) - 1);
        const auto found = block_codes<V, bits, i, bits - 1>(chunk);
        static_assert(sizeof(found) == 64);
        uint64_t words[8];
        std::memcpy(words, &found, 64);
        for (auto& word : words) word &= mask;
        const auto* bytes = reinterpret_cast<const uint8_t*>(words);
        const int64_t columns = layout.padded_columns();
        if (layout.rows_per_tile == 16)
            for (int r = 0; r < 16; ++r) std::memcpy(codes + r * columns + 4 * at, bytes + 4 * r, 4);
        else if (layout.rows_per_tile == 4)
            for (int r = 0; r < 4; ++r) std::memcpy(codes + r * columns + 16 * at, bytes + 16 * r, 16);
        else std::memcpy(codes + 64 * at, bytes, 64);
    }

    template <int... i>
    BITMILL_INLINE void tile(std::integer_sequence<int, i...>, const uint8_t* stored) const {
        for (int64_t c = 0; c < layout.chunks(); ++c) (block<i>(stored + c * 64 * bits, 8 * c + i), ...);
    }
};

template <class V, int bits>
void unpack_tile(const Layout& layout, const uint8_t* stored, uint8_t* codes) {
    Unpacked<V, bits>{layout, codes}.tile(std::make_integer_sequence<int, 8>{}, stored);
}

// Of R = 16, 4 or 1 rows a tile.
template <class V, int bits>
void decode_rows(const Levels& w, float* out, uint8_t* codes, int64_t first, int64_t last) {
    const Layout& l = w.layout;
    const int64_t R = l.rows_per_tile, columns = l.padded_columns(), stored = l.group_blocks * l.block_columns();
    float found[16];
    for (int64_t tile = first / R; tile * R < last; ++tile) {
        unpack_tile<V, bits>(l, w.codes + tile * l.tile_bytes(), codes);
        for (int64_t row = tile * R < first ? first : tile * R; row < (tile + 1) * R && row < last; ++row) {
            for (int64_t g = 0; g < l.groups(); ++g) {
                const int64_t start = g * l.group, left = l.columns - start, count = left < l.group ? left : l.group;
                const uint8_t* from = codes + row % R * columns + g * stored;
                float* to = out + (row - first) * l.columns + start;
                const float* table = w.tables + (w.ids ? w.ids[w.ids_at(row, g)] << bits : 0);
                const auto scale = V::all(w.scales[w.scales_at(row, g)]), zero = V::all(w.zeros[w.zeros_at(row, g)]);
                for (int64_t i = 0; i < count; i += 16) {
                    const auto at = V::template sixteen<0>(V::load(from + i));
                    const auto values = V::mul(V::sub(V::template look<bits>(table, at), zero), scale);
                    if (i + 16 <= count) V::store(to + i, values);
                    else V::store(found, values), std::memcpy(to + i, found, (count - i) * sizeof(float));
                }
            }
        }
    }
}

template <class V, int bits = 1>
void decode_rows_with(const Levels& w, float* out, uint8_t* codes, int64_t first, int64_t last) {
    if (w.layout.bits == bits) return decode_rows<V, bits>(w, out, codes, first, last);
    if constexpr (bits < 8) decode_rows_with<V, bits + 1>(w, out, codes, first, last);
}

}  // namespace bitmill
