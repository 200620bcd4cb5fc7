// The kernels of additive.h for an instruction set V.
#pragma once
#include <cstring>
#include <utility>

#include "../lut/codes-inl.h"
#include "../simd/round.h"
#include "additive.h"

namespace bitmill {

// Products of one block of inputs with all vectors of a codebook.
template <class V, int entries>
BITMILL_INLINE void products(const Additive& w, const float* x, int64_t code, float* out) {
    const float* book = w.books + code % w.codebooks * w.width * entries;
    x += code / w.codebooks * w.width;
    for (int k = 0; k < entries; k += 16) {
        typename V::Floats sum = V::zero();
        for (int i = 0; i < w.width; ++i) sum = V::fma(V::all(x[i]), V::template rows<16>(book + i * entries + k), sum);
        V::store(out + k, sum);
    }
}

template <class V, int entries>
void tables_of(const Additive& w, const float* x, uint8_t* tables, float* steps, int64_t first, int64_t last) {
    const Layout& l = w.layout;
    float exact[8 * entries];
    for (int64_t c = first; c < last; ++c) {
        const int64_t group = c * 8 / l.group_blocks;
        for (int i = 0; i < 8; ++i) {
            const int64_t within = c * 8 + i - group * l.group_blocks, code = group * l.group + within;
            float* out = exact + i * entries;
            if (within < l.group && code < l.columns) products<V, entries>(w, x, code, out);
            else for (int k = 0; k < entries; ++k) out[k] = 0;  // padding
        }
        const Step step = step_of(exact, 8 * entries, Additive::reach);
        steps[c] = step.size;
        for (int i = 0; i < 8; ++i) {
            uint8_t* low = tables + (c * 16 + 2 * i) * entries;
            for (int k = 0; k < entries; ++k) {
                const int32_t n = step.integer(exact[i * entries + k]);
                low[k] = static_cast<uint8_t>(n ^ V::bias);
                low[k + entries] = static_cast<uint8_t>(n >> 8 ^ V::bias);
            }
        }
    }
}

template <class V, int bits, int i>
BITMILL_INLINE void add_code(const uint8_t* codes, const uint8_t* tables, typename V::Shorts& sums) {
    constexpr int looked = bits <= 6 ? 6 : 8, entries = 1 << looked;
    const auto code = block_codes<V, bits, i, bits - 1>(codes);
    typename V::template Whole<looked> low, high;
    low.load(tables + 2 * i * entries);
    high.load(tables + (2 * i + 1) * entries);
    sums = V::add(sums, low.look(code), high.look(code));
}

template <class V, int bits, int... i>
BITMILL_INLINE typename V::Shorts sums_of(const uint8_t* codes, const uint8_t* tables, std::integer_sequence<int, i...>) {
    typename V::Shorts sums = V::no_shorts();
    (add_code<V, bits, i>(codes, tables, sums), ...);
    return sums;
}

template <class V, int bits>
void tiles_of(const Additive& w, const uint8_t* tables, const float* steps, float* y, int64_t first, int64_t last) {
    const Layout& l = w.layout;
    const int64_t chunks = l.chunks(), in_group = l.group_blocks / 8;
    for (int64_t tile = first; tile < last; ++tile) {
        const uint8_t* codes = w.codes + tile * l.tile_bytes();
        const uint16_t* scales = w.scales + tile * l.groups() * Additive::rows;
        typename V::Floats total[4] = {V::zero(), V::zero(), V::zero(), V::zero()}, now[4];
        for (int64_t c = 0; c < chunks; scales += Additive::rows) {
            typename V::Floats part[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
            for (const int64_t stop = c + in_group < chunks ? c + in_group : chunks; c < stop; ++c) {
                const uint8_t* eight = tables + c * 16 * w.entries();
                V::to_floats(sums_of<V, bits>(codes + c * 64 * bits, eight, std::make_integer_sequence<int, 8>{}), now);
                for (int i = 0; i < 4; ++i) part[i] = V::fma(V::all(steps[c]), now[i], part[i]);
            }
            for (int i = 0; i < 4; ++i) total[i] = V::fma(V::template rows<16>(scales + 16 * i), part[i], total[i]);
        }
        float lanes[Additive::rows];
        for (int i = 0; i < 4; ++i) V::store(lanes + 16 * i, total[i]);
        const int64_t row = tile * Additive::rows, left = l.rows - row;
        std::memcpy(y + row, lanes, (left < Additive::rows ? left : Additive::rows) * sizeof(float));
    }
}

template <class V>
void additive_tables(const Additive& w, const float* x, uint8_t* tables, float* steps, int64_t first, int64_t last) {
    (w.entries() == 64 ? tables_of<V, 64> : tables_of<V, 256>)(w, x, tables, steps, first, last);
}

template <class V>
void additive_tiles(const Additive& w, const uint8_t* tables, const float* steps, float* y, int64_t first, int64_t last) {
    constexpr void (*of_width[])(const Additive&, const uint8_t*, const float*, float*, int64_t, int64_t) = {
        tiles_of<V, 1>, tiles_of<V, 2>, tiles_of<V, 3>, tiles_of<V, 4>,
        tiles_of<V, 5>, tiles_of<V, 6>, tiles_of<V, 7>, tiles_of<V, 8>};
    of_width[w.layout.bits - 1](w, tables, steps, y, first, last);
}

template <class V>
constexpr AdditiveKernels additive_kernels = {additive_tables<V>, additive_tiles<V>};

}  // namespace bitmill
