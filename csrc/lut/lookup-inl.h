// The lookup kernels (lookup.h): one body for every instruction set V (simd/*.h).
//
// Tables hold unsigned bytes, or 16-bit numbers in two byte tables (`wide`). Inputs are signed integers of 8 bits, or
// of 16 in two bytes, times one step for every few columns, so that a block of 64 codes costs a lookup and a dot
// product of bytes (or two); sums are exact integers until a step ends.
#pragma once
#include <type_traits>
#include <utility>

#include "../simd/inline.h"
#include "codes-inl.h"
#include "lookup.h"

namespace bitmill {

// The entries of block i of a chunk, in tables that are one for all rows (`whole`) or lanes of several.
template <class V, int bits, int i, bool whole, class Look>
BITMILL_INLINE typename V::Bytes entries_of(const Look& look, const uint8_t* codes) {
    if constexpr (V::split_third_bit && bits == 3 && !whole)
        return look.look(block_codes<V, 2, i, 0>(codes), block_bits<V, i, Look::top>(codes + 128));
    else return look.look(block_codes<V, bits, i, Look::top>(codes));
}

// One tile's worth of state: R rows, T tokens.
template <class V, int bits, int R, Source source, bool wide, Act act, int T>
struct Tile {
    using Bytes = typename V::Bytes;
    using Floats = typename V::Floats;
    static constexpr int S = step_blocks(R, 8), C = 64 / R;
    static constexpr bool whole = source == Source::shared || R == 1;
    using Look = std::conditional_t<whole, typename V::template Whole<bits>,
                                    std::conditional_t<bits == 4 && R == 16, typename V::Sums, typename V::template Lanes<bits>>>;

    const Weights& w;
    const Inputs& in;
    const int64_t tile, groups;
    const int F;  // blocks of a group where there are fewer than 8, else 8: 2, 4 or 8
    int64_t step = 0, group = 0;
    Look low, high;
    Floats total[T], part[T], power;
    // dot products of table bytes (low, high) and input bytes (high, low); what does not exist stays unused
    typename V::Ints acc[2][2][T];
    static constexpr bool small = source == Source::bank;  // entries of at most 63: blocks are multiplied two at a time
    Bytes even;  // where small, the entries of the last even block

    BITMILL_INLINE Tile(const Weights& w, const Inputs& in, int64_t tile)
        : w(w), in(in), tile(tile), groups(w.layout.padded_groups()),
          F(w.layout.group_blocks < 8 ? w.layout.group_blocks : 8) {
        if constexpr (source == Source::bank) low.hold_bank(w.tables);
        else load_tables(w.tables + tile * w.records_per_tile * w.record_bytes);
        for (int t = 0; t < T; ++t) total[t] = V::zero();
        clear();
    }

    BITMILL_INLINE void load_tables(const uint8_t* record) {
        load_table(low, record);
        if constexpr (wide) load_table(high, record + w.record_bytes / 2);
    }

    BITMILL_INLINE void load_table(Look& to, const uint8_t* record) {
        if constexpr (source == Source::own && !whole && bits >= 3) {
            if (w.mirrored) return to.load_mirrored(record);
        }
        to.load(record);
    }

    BITMILL_INLINE void clear() {
        for (int t = 0; t < T; ++t) acc[0][0][t] = acc[0][1][t] = acc[1][0][t] = acc[1][1][t] = V::no_ints();
    }

    BITMILL_INLINE int64_t place() const { return (tile * groups + group) * R; }

    BITMILL_INLINE void begin_group() {
        if constexpr (source == Source::bank) {
            const uint8_t* ids = w.ids + place();
            low.from_bank(ids, (1 << w.bank_bits) - 1);
            power = V::template named<R>(w.powers, ids, w.bank_bits);
        } else if constexpr (source == Source::own) {
            if (w.records_per_tile > 1) load_tables(w.tables + place() / R * w.record_bytes);
        }
        for (int t = 0; t < T; ++t) part[t] = V::zero();
    }

    template <int i>
    BITMILL_INLINE void block(const uint8_t* codes, int64_t chunk) {
        const Bytes u = entries_of<V, bits, i, whole>(low, codes);
        Bytes v{};
        if constexpr (wide) v = entries_of<V, bits, i, whole>(high, codes);
        if constexpr (small && i % 2 == 0) {
            even = u;
            return;
        }
        for (int t = 0; t < T; ++t) {
            const int64_t first = t * in.columns + (chunk * 8 + i) * C;
            dots<0>(u, v, in.bytes + first, t);
            if constexpr (act == Act::int16) dots<1>(u, v, in.lows + first, t);
        }
        constexpr bool stepped = (i + 1) % S == 0;
        if constexpr (stepped) end_step();
        if constexpr (i == 3 || (R == 4 && i % 2 == 1 && i < 7)) {  // where groups of less than a chunk may end
            if (((i + 1) & (F - 1)) == 0) {
                if constexpr (!stepped) end_step();
                end_group(), begin_group();
            }
        }
    }

    template <int plane>
    BITMILL_INLINE void dots(const Bytes& u, const Bytes& v, const int8_t* inputs, int t) {
        const Bytes x = V::template spread<R>(inputs);
        if constexpr (small) acc[0][plane][t] = V::dot_small(acc[0][plane][t], even, V::template spread<R>(inputs - C), u, x);
        else acc[0][plane][t] = V::dot(acc[0][plane][t], u, x);
        if constexpr (wide) acc[1][plane][t] = V::dot(acc[1][plane][t], v, x);
    }

    BITMILL_INLINE void end_step() {
        for (int t = 0; t < T; ++t) {
            Floats sum = of_tables(0, t);
            if constexpr (act == Act::int16) sum = V::fma(V::all(255.0f), sum, of_tables(1, t));
            part[t] = V::fma(V::all(in.steps[t * in.step_count + step]), sum, part[t]);
        }
        clear();
        ++step;
    }

    BITMILL_INLINE Floats of_tables(int plane, int t) const {
        const Floats sum = V::to_float(acc[0][plane][t]);
        if constexpr (wide) return V::fma(V::all(256.0f), V::to_float(acc[1][plane][t]), sum);
        else return sum;
    }

    static constexpr float bias = (small ? 0.0f : wide ? 257.0f : 1.0f) * V::bias;
    static BITMILL_INLINE Floats unbiased(Floats zero) {
        if constexpr (bias != 0) return V::sub(zero, V::all(bias));
        else return zero;
    }

    BITMILL_INLINE void end_group() {
        Floats zero = V::all(w.zero - bias);
        if (w.zero_kind == Zero::bytes)
            zero = unbiased(V::template rows<R>(static_cast<const uint8_t*>(w.zeros) + place()));
        else if (w.zero_kind == Zero::halves)
            zero = unbiased(V::template rows<R>(static_cast<const uint16_t*>(w.zeros) + place()));
        Floats scale = V::all(1.0f);
        if constexpr (source == Source::bank) scale = power;
        else if (w.wide_scales) scale = V::template rows<R>(static_cast<const float*>(w.scales) + place());
        else if (w.scales) scale = V::template rows<R>(static_cast<const uint16_t*>(w.scales) + place());
        for (int t = 0; t < T; ++t) {
            const Floats sum = V::all(in.sums[t * in.groups + group] * (R / 16.0f));  // a row's lanes are added up
            total[t] = V::fma(scale, V::fnma(zero, sum, part[t]), total[t]);
        }
        ++group;
    }

    template <int... i>
    BITMILL_INLINE void chunk(std::integer_sequence<int, i...>, const uint8_t* codes, int64_t c) {
        (block<i>(codes, c), ...);
    }

    BITMILL_INLINE void run(float* y, int64_t stride) {
        const int64_t chunks = w.layout.chunks(), in_group = w.layout.group_blocks < 8 ? 1 : w.layout.group_blocks / 8;
        const uint8_t* codes = w.codes + tile * w.layout.tile_bytes();
        for (int64_t c = 0; c < chunks;) {
            begin_group();
            const int64_t stop = c + in_group < chunks ? c + in_group : chunks;
            for (; c < stop; ++c, codes += 64 * bits) {
                prefetch<64 * bits>(codes);
                chunk(std::make_integer_sequence<int, 8>{}, codes, c);
            }
            end_group();
        }
        for (int t = 0; t < T; ++t) {
            float lanes[16];
            V::store(lanes, total[t]);
            for (int r = 0; r < R && tile * R + r < w.layout.rows; ++r) {
                float sum = 0;
                for (int l = 0; l < 16 / R; ++l) sum += lanes[r * (16 / R) + l];
                y[t * stride + tile * R + r] = sum * w.row_scales[tile * R + r];
            }
        }
    }
};

template <class V, int bits, int R, Source source, bool wide, Act act, int T>
void tiles(const Weights& w, const Inputs& in, float* y, int64_t stride, int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; ++tile)
        Tile<V, bits, R, source, wide, act, T>(w, in, tile).run(y, stride);
}

}  // namespace bitmill
