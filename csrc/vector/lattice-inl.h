// The lattice E8 at the speed of the lookup kernels, for an instruction set V: its points as numbers of 4 bits.
//
// Four times a coordinate is an odd number from -11 to 11: sign * (2 + 4 size) + 1 or - 1, size 0, 1 or 2. The sizes of
// a pattern are two bytes, so that two lookups of 256 entries serve 8 coordinates: bits 0, 2, 4 and 6 of the one begin
// those of coordinates 0, 1, 4 and 5, of the other those of 2, 3, 6 and 7. A shift puts two of them, at a distance of 4, where
// the signs and the block's shift complete them to numbers of 4 bits.
//
// Codes are repacked byte by byte: tiles of 16 rows, in them squares of 32 columns in two vectors, the patterns
// of 16 rows by 4 blocks and the other bytes of the same codes. A vector of coordinates i has, then, columns i,
// 8 + i, 16 + i and 24 + i of 16 rows: inputs are taken in that order (lattice_order).
#pragma once
#include <cstring>
#include <utility>
#include <vector>

#include "../lut/codes-inl.h"
#include "tiles-inl.h"
#include "vector.h"

namespace bitmill {

template <class V>
struct LatticeCodes {
    using Bytes = typename V::Bytes;
    static constexpr int offset = 11;  // of entries, so that they are at least 0
    typename V::template Whole<8> halves[2];
    typename V::template Whole<4> levels;

    explicit LatticeCodes(const Lattice& w) {
        uint8_t entries[256];
        for (int h = 0; h < 2; ++h) halves[h].load_small(w.sizes + 256 * h);
        for (int i = 0; i < 64; ++i) {
            const int size = 2 + 4 * (i & 3), shift = i & 8 ? 1 : -1;
            entries[i] = static_cast<uint8_t>(offset + (i & 4 ? -size : size) + shift);
        }
        levels.load_small(entries);
    }

    // use(i, levels of coordinates i, levels of coordinates i + 4) for i from 0 to 3, of one square.
    template <class Use>
    BITMILL_INLINE void square(const uint8_t* codes, const Use& use) const {
        const Bytes pattern = V::load(codes), rest = V::load(codes + 64);
        const Bytes sizes[2] = {halves[0].look(pattern), halves[1].look(pattern)};
        // the eighth sign makes the sum of a point even: the parity of seven signs and of all sizes
        Bytes parity = V::differ(V::template select<127>(rest, Bytes{}),
                                 V::template select<0x55>(V::differ(sizes[0], sizes[1]), Bytes{}));
        parity = V::differ(parity, V::template shifted<-4>(parity));
        parity = V::differ(parity, V::template shifted<-2>(parity));
        parity = V::differ(parity, V::template shifted<-1>(parity));
        const Bytes signs = V::template select<127>(rest, parity);
        const Bytes shifts = V::template select<128>(rest, V::template shifted<4>(rest));  // in bits 3 and 7
        pairs(std::make_integer_sequence<int, 4>{}, sizes, signs, shifts, use);
    }

    // A byte holds the numbers of coordinates i and i + 4.
    template <int... i, class Use>
    BITMILL_INLINE void pairs(std::integer_sequence<int, i...>, const Bytes (&sizes)[2], Bytes signs,
                              Bytes shifts, const Use& use) const {
        const Bytes both[] = {
            V::template select<0x33>(V::template shifted<2 * (i % 2)>(sizes[i / 2]),
                                     V::template select<0x44>(V::template shifted<i - 2>(signs), shifts))...};
        (use(i, levels.look(both[i]), levels.look(V::template shifted<4>(both[i]))), ...);
    }
};

template <class V, Act act, int T>
struct LatticeTile {
    using Floats = typename V::Floats;
    const Lattice& w;
    const Inputs& in;
    const LatticeCodes<V> codes;

    BITMILL_INLINE LatticeTile(const Lattice& w, const Inputs& in) : w(w), in(in), codes(w) {}

    BITMILL_INLINE void run(int64_t tile, float* y, int64_t stride) const {
        constexpr float offset = codes.offset;
        const uint8_t* stored = w.codes + tile * w.layout.tile_bytes();
        Floats total[T];
        for (int t = 0; t < T; ++t) total[t] = V::all(-offset * in.sums[t * in.groups]);
        for (int64_t s = 0; s < w.layout.chunks(); ++s, stored += Lattice::square_bytes) {
            prefetch<Lattice::square_bytes>(stored);
            typename V::Ints products[2][T];  // of the high and the low bytes of inputs
            for (int t = 0; t < T; ++t) products[0][t] = products[1][t] = V::no_ints();
            codes.square(stored, [&](int i, typename V::Bytes some, typename V::Bytes more) {
                for (int t = 0; t < T; ++t) {
                    const int64_t first = t * in.columns + 32 * s + 4 * i;
                    const auto dots = [&](typename V::Ints sum, const int8_t* x) {
                        return V::dot_small(sum, some, V::template spread<16>(x), more, V::template spread<16>(x + 16));
                    };
                    products[0][t] = dots(products[0][t], in.bytes + first);
                    if constexpr (act == Act::int16) products[1][t] = dots(products[1][t], in.lows + first);
                }
            });
            for (int t = 0; t < T; ++t) {
                Floats sum = V::to_float(products[0][t]);
                if constexpr (act == Act::int16) sum = V::fma(V::all(255.0f), sum, V::to_float(products[1][t]));
                total[t] = V::fma(V::all(in.steps[t * in.step_count + s]), sum, total[t]);
            }
        }
        for (int t = 0; t < T; ++t) store_rows<V>(w, V::mul(V::all(0.25f), total[t]), tile, y + t * stride);
    }
};

template <class V, Act act>
struct LatticeKind {
    template <int T>
    using Tile = LatticeTile<V, act, T>;
};

template <class V>
void lattice_linear_with(const Lattice& w, const Inputs& in, Act act, int64_t tokens, float* y, int64_t first,
                         int64_t last) {
    if (act == Act::int8) tiles_of<V, LatticeKind<V, Act::int8>>(w, in, tokens, y, first, last);
    else tiles_of<V, LatticeKind<V, Act::int16>>(w, in, tokens, y, first, last);
}

// out is (last - first, columns). Levels are exact in fp32, so that it rounds as the format does.
template <class V>
void lattice_decode_with(const Lattice& w, float* out, int64_t columns, int64_t first, int64_t last) {
    const LatticeCodes<V> codes(w);
    const int64_t width = w.layout.columns;
    std::vector<int8_t> levels(16 * width);
    for (int64_t tile = first / 16; tile * 16 < last; ++tile) {
        const uint8_t* stored = w.codes + tile * w.layout.tile_bytes();
        for (int64_t s = 0; s < w.layout.chunks(); ++s, stored += Lattice::square_bytes)
            codes.square(stored, [&](int i, typename V::Bytes some, typename V::Bytes more) {
                const typename V::Bytes found[2] = {some, more};
                int8_t bytes[128];
                std::memcpy(bytes, found, 128);
                for (int64_t b = 0; b < 128; ++b)
                    levels[b % 64 / 4 * width + 32 * s + b % 4 * 8 + b / 64 * 4 + i] = bytes[b];
            });
        for (int64_t row = tile * 16 < first ? first : tile * 16; row < tile * 16 + 16 && row < last;
             ++row, out += columns) {
            const float scale = w.scale_of(row);
            const int8_t* from = levels.data() + row % 16 * width;
            for (int64_t c = 0; c < columns; ++c)
                out[c] = 0.25f * static_cast<float>(from[c] - codes.offset) * scale;
        }
    }
}

}  // namespace bitmill
