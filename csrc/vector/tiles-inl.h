// Tiles of 16 rows with a few tokens at a time, for an instruction set V: the loops around the kernels of this folder.
#pragma once
#include <cstdint>

#include "../lut/lookup-inl.h"

namespace bitmill {

// Tiles [first, last). Kind::Tile<T> is made from the weights and inputs of T tokens; run(tile, y, stride) does one.
template <class V, class Kind, class W>
void tiles_of(const W& w, const Inputs& in, int64_t tokens, float* y, int64_t first, int64_t last) {
    const int64_t rows = w.layout.rows;
    constexpr int64_t cached_tiles = 16;  // that all tokens visit before the next ones are read
    const int64_t share = tokens > 1 ? cached_tiles : last - first;
    for (int64_t next; first < last; first = next) {
        next = first + share < last ? first + share : last;
        for (int64_t t = 0; t < tokens;) {
            Inputs rest = in;
            rest.bytes += t * in.columns, rest.lows += in.lows ? t * in.columns : 0;
            rest.steps += t * in.step_count, rest.sums += t * in.groups;
            const auto run = [&](auto tile) {
                for (int64_t i = first; i < next; ++i) tile.run(i, y + t * rows, rows);
            };
            if (V::batch > 1 && t + V::batch <= tokens)
                run(typename Kind::template Tile<V::batch>(w, rest)), t += V::batch;
            else run(typename Kind::template Tile<1>(w, rest)), t += 1;
        }
    }
}

// Of the rows of tile `tile`, from their lanes.
template <class V, class W>
BITMILL_INLINE void store_rows(const W& w, typename V::Floats total, int64_t tile, float* y) {
    float lanes[16];
    V::store(lanes, total);
    for (int64_t r = 0; r < 16 && tile * 16 + r < w.layout.rows; ++r)
        y[tile * 16 + r] = lanes[r] * w.scale_of(tile * 16 + r);
}

}  // namespace bitmill
