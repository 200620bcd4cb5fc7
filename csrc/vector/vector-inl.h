// The kernels of vector.h for an instruction set V.
#pragma once
#include "../simd/inline.h"
#include "e8-inl.h"
#include "lattice-inl.h"
#include "nearest-inl.h"
#include "pyramid-inl.h"
#include "points-inl.h"
#include "trellis-inl.h"
#include "viterbi-inl.h"

namespace bitmill {

// Columns from `first` on of a row, at most a piece of them, in whole blocks; returns how many belong to the row.
template <class Set>
BITMILL_INLINE int64_t decode_piece(const Vectors& w, const Set& set, int64_t row, int64_t first, float* out) {
    const int64_t left = w.columns - first, count = left < Vectors::piece ? left : Vectors::piece;
    set.points(w.words + row * w.words_per_row, first / Set::width, (count + Set::width - 1) / Set::width, out);
    const float* scales = w.scales_of(row);
    for (int64_t c = first; c < first + count;) {
        const int64_t group = c / w.group, stop = (group + 1) * w.group;
        const float scale = scales[group];
        for (const int64_t end = stop < first + count ? stop : first + count; c < end; ++c)
            out[c - first] *= scale;
    }
    return count;
}

template <class V, class Set>
void vector_linear_of(const Vectors& w, const float* x, int64_t tokens, float* y, int64_t first, int64_t last) {
    const Set set(w);
    float values[Vectors::piece], lanes[16];
    for (int64_t row = first; row < last; ++row) {
        for (int64_t t = 0; t < tokens; ++t) y[t * w.rows + row] = 0;
        for (int64_t c = 0; c < w.columns; c += Vectors::piece) {
            const int64_t count = decode_piece(w, set, row, c, values), whole = (count + 15) / 16 * 16;
            for (int64_t i = count; i < whole; ++i) values[i] = 0;
            for (int64_t t = 0; t < tokens; ++t) {
                const float* in = x + t * w.padded_columns() + c;
                typename V::Floats sums[2] = {V::zero(), V::zero()};
                for (int64_t i = 0; i < whole; i += 16)
                    sums[i / 16 % 2] = V::fma(V::template rows<16>(values + i), V::template rows<16>(in + i),
                                              sums[i / 16 % 2]);
                V::store(lanes, V::add(sums[0], sums[1]));
                float sum = 0;
                for (const float lane : lanes) sum += lane;
                y[t * w.rows + row] += sum;
            }
        }
    }
}

template <class V, class Set>
void vector_decode_of(const Vectors& w, float* out, int64_t first, int64_t last) {
    const Set set(w);
    float values[Vectors::piece];
    for (int64_t row = first; row < last; ++row, out += w.columns)
        for (int64_t c = 0; c < w.columns; c += Vectors::piece) {
            const int64_t count = decode_piece(w, set, row, c, values);
            std::memcpy(out + c, values, count * sizeof(float));
        }
}

template <class V>
void vector_linear_with(const Vectors& w, const float* x, int64_t tokens, float* y, int64_t first,
                        int64_t last) {
    constexpr decltype(&vector_linear_with<V>) of[] = {vector_linear_of<V, E8<V>>, vector_linear_of<V, Pyramid<V>>,
                                                       vector_linear_of<V, TrellisLevels<V>>};
    of[static_cast<int>(w.set)](w, x, tokens, y, first, last);
}

template <class V>
void vector_decode_with(const Vectors& w, float* out, int64_t first, int64_t last) {
    constexpr decltype(&vector_decode_with<V>) of[] = {vector_decode_of<V, E8<V>>, vector_decode_of<V, Pyramid<V>>,
                                                       vector_decode_of<V, TrellisLevels<V>>};
    of[static_cast<int>(w.set)](w, out, first, last);
}

template <class V>
void coordinates_with(const Vectors& w, int8_t* y, uint8_t* gains, int64_t first, int64_t last) {
    const Pyramid<V> set(w);
    const int64_t points = (w.columns + 15) / 16;
    int32_t point[16];
    for (int64_t row = first; row < last; ++row)
        for (int64_t p = 0; p < points; ++p, y += 16) {
            *gains++ = static_cast<uint8_t>(set.coordinates(w.words + row * w.words_per_row, p, point));
            for (int i = 0; i < 16; ++i) y[i] = static_cast<int8_t>(point[i]);
        }
}

template <class V>
constexpr VectorKernels vector_kernels = {vector_linear_with<V>, vector_decode_with<V>, coordinates_with<V>,
                                          nearest_points_with<V>, trellis_codes_with<V>,
                                          points_linear_with<V>, points_decode_with<V>,
                                          lattice_linear_with<V>, lattice_decode_with<V>};

}  // namespace bitmill
