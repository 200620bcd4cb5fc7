// y = x W^T from codes of 1 to 8 bits, by table lookup: one body for every instruction set V (simd/*.h).
//
//     W^[r, k] = row_scale[r] * scale[r, g] * (table[code] - zero[r, g])            g the group of column k
//
// Tables hold unsigned bytes, or 16-bit numbers in two byte tables (`wide`). Inputs are signed integers of 8 bits, or
// of 16 in two bytes, times one step for every few columns, so that a block of 64 codes costs a lookup and a dot
// product of bytes (or two); sums are exact integers until a step ends.
#pragma once
#include <type_traits>
#include <utility>

#include "../simd/inline.h"
#include "codes.h"
#include "layout.h"

namespace bitmill {

// Whose table it is: one for all, each row's (or each row's in each group), or one of a bank of up to 32, whose entries
// are at most 63.
enum class Source { shared, own, bank };
enum class Zero { constant, bytes, halves };
enum class Act { int8, int16, float32 };  // what inputs are rounded to

struct Weights {
    Layout layout;
    Source source;
    bool wide;
    const uint8_t* codes;
    const uint8_t* tables;      // records of V::Whole or V::Lanes; of a wide table the low bytes, then the high;
                                // for float32 of fp32, row by row
    bool mirrored;              // own tables of 3 or 4 bits hold the first half: entry[~code] = ~entry[code]
    int64_t record_bytes;       // of one table record
    int64_t records_per_tile;   // 0 for one record in all, 1, or one for every padded group
    const uint8_t* ids;         // (tiles, padded groups, R): table + tables_in_bank * power, with a bank
    int bank_bits;              // log2 of tables_in_bank
    const float* powers;        // (16,) factors that ids name
    const void* scales;         // fp16, or fp32 with `wide_scales`, (tiles, padded groups, R); null for 1
    bool wide_scales;
    Zero zero_kind;
    float zero;                 // the constant
    const void* zeros;          // (tiles, padded groups, R)
    const float* row_scales;    // (tiles, R)

    // Tables of 4 bits in a bank that are sums of what two pairs of bits stand for serve 16 rows: V::Sums.
    bool summed() const { return source == Source::bank && layout.bits == 4 && layout.rows_per_tile == 16; }
};

// Inputs of a few tokens in the padded order of columns. `sums` are of the inputs as the kernel sees them.
struct Inputs {
    const int8_t* bytes;   // (tokens, padded columns); of int16 the high bytes
    const int8_t* lows;    // of int16 the low bytes: x = 255 high + low, each from -127 to 127
    const float* steps;    // (tokens, blocks / step_blocks)
    const float* sums;     // (tokens, padded groups)
    const float* floats;   // (tokens, padded columns), with float32 in place of the first three
    int64_t columns, step_count, groups;  // strides of a token
};

// Blocks that share one step of the inputs: those of 32 columns, of 64 where blocks are wide, or of the group.
constexpr int step_blocks(int rows_per_tile, int group_blocks) {
    const int most = rows_per_tile == 16 ? 8 : rows_per_tile == 4 ? 4 : 1;
    return group_blocks < most ? group_blocks : most;
}

// The entries of block i of a chunk, in tables that are one for all rows (`whole`) or lanes of several.
template <class V, int bits, int i, bool whole, class Look>
BITMILL_INLINE typename V::Bytes entries_of(const Look& look, const uint8_t* codes) {
    if constexpr (V::apart && bits == 3 && !whole)
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

// Tiles [first, last) of T tokens; y is (tokens, stride).
using Kernel = void (*)(const Weights&, const Inputs&, float* y, int64_t stride, int64_t first, int64_t last);

template <class V, int bits, int R, Source source, bool wide, Act act, int T>
void tiles(const Weights& w, const Inputs& in, float* y, int64_t stride, int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; ++tile)
        Tile<V, bits, R, source, wide, act, T>(w, in, tile).run(y, stride);
}

struct FixedPanel;  // fixed/fixed.h
using PanelKernel = void (*)(const Weights&, int64_t tile, FixedPanel& out);

// What an instruction set has: the kernel for some weights and 1 or 4 tokens at once, or null where there is none
// (lut/choose.h says which exist), that of float32 inputs for one token, and what makes a tile a panel for many tokens, or
// null where no kernel does.
struct LookupKernels {
    Kernel (*choose)(const Weights& w, Act act, int tokens);
    Kernel (*floats)(const Weights& w);
    PanelKernel (*panel)(const Weights& w);
};
extern const LookupKernels avx512_lookup, avx2_lookup, neon_lookup, scalar_lookup;

}  // namespace bitmill
