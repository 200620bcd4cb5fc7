// The lookup kernels without integers: fp32 tables, inputs and sums. For an instruction set V.
//
// Sixteen codes at a time, four vectors v a block: of 4 rows and 4 columns with R = 16, of one row with R = 4, of 16
// columns of the one row with R = 1. Tables of own rows follow each other, so that four rows' are one larger table.
#pragma once
#include <cstring>

#include "codes-inl.h"
#include "lookup-inl.h"

namespace bitmill {

template <class V, int bits, int R, Source source>
struct FloatTile {
    using Floats = typename V::Floats;
    static constexpr int C = 64 / R, each = source == Source::shared || R == 1 ? 0 : 1 << bits;
    static constexpr int sums = R == 1 ? 1 : 4;  // vectors of rows

    const Weights& w;
    const Inputs& in;
    const int64_t tile, groups;
    const int F;
    int64_t group = 0;
    const float* table = nullptr;
    float gathered[source == Source::bank ? float_record(bits, R, source) : 1];
    Floats total[sums], part[sums];

    BITMILL_INLINE FloatTile(const Weights& w, const Inputs& in, int64_t tile)
        : w(w), in(in), tile(tile), groups(w.layout.padded_groups()),
          F(w.layout.group_blocks < 8 ? w.layout.group_blocks : 8) {
        for (auto& t : total) t = V::zero();
    }

    BITMILL_INLINE int64_t place() const { return (tile * groups + group) * R; }

    BITMILL_INLINE void begin_group() {
        table = reinterpret_cast<const float*>(w.tables);
        if constexpr (source == Source::own) {
            const int64_t record = tile * w.records_per_tile + (w.records_per_tile > 1 ? group : 0);
            table += record * float_record(bits, R, source);
        } else if constexpr (source == Source::bank) {
            const uint8_t* ids = w.ids + place();
            for (int r = 0; r < R; ++r)
                std::memcpy(gathered + (r << bits), table + ((ids[r] & ((1 << w.bank_bits) - 1)) << bits), sizeof(float) << bits);
            table = gathered;
        }
        for (auto& p : part) p = V::zero();
    }

    template <int v>
    BITMILL_INLINE void vector(typename V::Bytes code, const float* x) {
        const auto at = V::template masked<bits>(V::template sixteen<v>(code));
        Floats found;
        if constexpr (each && R == 16) found = V::template look<bits + 2>(table + 4 * v * each, V::template of_rows<bits>(at));
        else found = V::template look<bits>(table + v * each, at);
        if constexpr (R == 16) part[v] = V::fma(found, V::fours_of(x), part[v]);
        else if constexpr (R == 4) part[v] = V::fma(found, V::template rows<16>(x), part[v]);
        else part[0] = V::fma(found, V::template rows<16>(x + 16 * v), part[0]);
    }

    template <int i>
    BITMILL_INLINE void block(const uint8_t* codes, const float* x) {
        const auto code = block_codes<V, bits, i, bits - 1>(codes);
        vector<0>(code, x + i * C), vector<1>(code, x + i * C), vector<2>(code, x + i * C), vector<3>(code, x + i * C);
        if constexpr (i == 3 || (R == 4 && i % 2 == 1 && i < 7)) {
            if ((i + 1) % F == 0) end_group(), begin_group();
        }
    }

    // Numbers of the rows of vector v, each in all lanes of its row.
    template <class T>
    BITMILL_INLINE Floats of_rows(const T* numbers, int v) const {
        const T* at = numbers + place();
        if constexpr (R == 16) return V::template rows<4>(at + 4 * v);
        else return V::template rows<1>(at + v);
    }

    BITMILL_INLINE void end_group() {
        const Floats sum = V::all(in.sums[group] * (R == 16 ? 0.25f : 0.0625f));  // a row's lanes are added up
        for (int v = 0; v < sums; ++v) {
            Floats zero = V::all(w.zero), scale = V::all(1.0f);
            if (w.zero_kind == Zero::bytes) zero = of_rows(static_cast<const uint8_t*>(w.zeros), v);
            else if (w.zero_kind == Zero::halves) zero = of_rows(static_cast<const uint16_t*>(w.zeros), v);
            if (w.wide_scales) scale = of_rows(static_cast<const float*>(w.scales), v);
            else if (w.scales) scale = of_rows(static_cast<const uint16_t*>(w.scales), v);
            if constexpr (source == Source::bank) {
                float factors[R];
                for (int r = 0; r < R; ++r) factors[r] = w.powers[w.ids[place() + r] >> w.bank_bits];
                scale = R == 16 ? V::template rows<4>(factors + 4 * v) : V::template rows<1>(factors + v);
            }
            total[v] = V::fma(scale, V::fnma(zero, sum, part[v]), total[v]);
        }
        ++group;
    }

    template <int... i>
    BITMILL_INLINE void chunk(std::integer_sequence<int, i...>, const uint8_t* codes, const float* x) {
        (block<i>(codes, x), ...);
    }

    BITMILL_INLINE void run(float* y) {
        const int64_t chunks = w.layout.chunks(), in_group = w.layout.group_blocks < 8 ? 1 : w.layout.group_blocks / 8;
        const uint8_t* codes = w.codes + tile * w.layout.tile_bytes();
        const float* x = in.floats;
        for (int64_t c = 0; c < chunks;) {
            begin_group();
            const int64_t stop = c + in_group < chunks ? c + in_group : chunks;
            for (; c < stop; ++c, codes += 64 * bits, x += 8 * C) chunk(std::make_integer_sequence<int, 8>{}, codes, x);
            end_group();
        }
        constexpr int lanes_of_row = R == 16 ? 4 : 16;
        float lanes[16 * sums];
        for (int v = 0; v < sums; ++v) V::store(lanes + 16 * v, total[v]);
        for (int r = 0; r < R && tile * R + r < w.layout.rows; ++r) {
            float sum = 0;
            for (int l = 0; l < lanes_of_row; ++l) sum += lanes[r * lanes_of_row + l];
            y[tile * R + r] = sum * w.row_scales[tile * R + r];
        }
    }
};

template <class V, int bits, int R, Source source>
void float_tiles(const Weights& w, const Inputs& in, float* y, int64_t, int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; ++tile) FloatTile<V, bits, R, source>(w, in, tile).run(y);
}

template <class V, int bits>
Kernel float_kernel(const Weights& w) {
    constexpr int R = bits < 4 ? 16 : bits == 4 ? 4 : 1;
    if (w.layout.bits != bits) {
        if constexpr (bits < 8) return float_kernel<V, bits + 1>(w);
        return nullptr;
    }
    if (w.source == Source::shared) return float_tiles<V, bits, 16, Source::shared>;
    if (w.source == Source::own) return float_tiles<V, bits, R, Source::own>;
    if constexpr (bits <= 4) return float_tiles<V, bits, R, Source::bank>;
    return nullptr;
}

}  // namespace bitmill
