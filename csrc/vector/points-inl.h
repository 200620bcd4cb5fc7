// Repacked pyramid points: small integers in the layout of the lookup kernels (lut/layout.h): 16 rows a tile, 4 blocks of 64
// codes to the 16 columns of a point. For an instruction set V.
//
//     W^[r, k] = scale[r] * length[gain[r, p]] * y / |y|                           p the point of column k
//
// A code c > 0 is the coordinate y = c - 2^(bits - 1). A point with a coordinate beyond that range is `odd`: its
// codes are 0, which represent 0, and its product is added afterwards. |y|^2 is summed with the products.
#pragma once
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "../lut/codes-inl.h"
#include "../lut/decode-inl.h"
#include "../lut/lookup-inl.h"
#include "tiles-inl.h"
#include "vector.h"

namespace bitmill {

template <class V, int bits, Act act, int T>
struct PointTile {
    using Look = typename V::template Whole<bits>;
    using Floats = typename V::Floats;
    static constexpr int half = 1 << (bits - 1);  // what entries are above coordinates, so that they are at least 0

    const Points& w;
    const Inputs& in;
    Look values, sizes;
    typename V::Bytes even[2];  // values and sizes of the last even block
    typename V::Ints products[2][T], power;  // of the high and the low bytes of inputs
    Floats total[T];

    BITMILL_INLINE PointTile(const Points& w, const Inputs& in) : w(w), in(in) {
        uint8_t entries[2][64];
        for (int i = 0; i < 64; ++i) {
            const int code = i % (2 * half), y = code ? code - half : 0;
            entries[0][i] = static_cast<uint8_t>(half + y);
            entries[1][i] = static_cast<uint8_t>(code ? std::abs(y) : half);  // no point has the length 0
        }
        values.load_small(entries[0]);
        sizes.load_small(entries[1]);
    }

    BITMILL_INLINE void clear() {
        power = V::no_ints();
        for (int t = 0; t < T; ++t) products[0][t] = products[1][t] = V::no_ints();
    }

    template <int i>
    BITMILL_INLINE void block(const uint8_t* codes, const uint8_t* gains, int64_t chunk) {
        const auto code = block_codes<V, bits, i, Look::top>(codes);
        const auto value = values.look(code), size = sizes.look(code);
        if constexpr (i % 2 == 0) {
            even[0] = value, even[1] = size;
            return;
        }
        power = V::dot_small(power, even[1], even[1], size, size);
        for (int t = 0; t < T; ++t) {
            const auto dots = [&](typename V::Ints sum, const int8_t* x) {
                const int8_t* at = x + t * in.columns + (chunk * 8 + i) * 4;
                return V::dot_small(sum, even[0], V::template spread<16>(at - 4), value, V::template spread<16>(at));
            };
            products[0][t] = dots(products[0][t], in.bytes);
            if constexpr (act == Act::int16) products[1][t] = dots(products[1][t], in.lows);
        }
        if constexpr (i % 4 == 3) end_point<i / 4>(gains, 2 * chunk + i / 4);
    }

    template <int nibble>
    BITMILL_INLINE void end_point(const uint8_t* gains, int64_t point) {
        const Floats factor = V::mul(V::template named<16>(w.lengths, gains, 4 * nibble),
                                     V::inverse_root(V::to_float(power)));
        for (int t = 0; t < T; ++t) {
            Floats sum = V::to_float(products[0][t]);
            if constexpr (act == Act::int16) sum = V::fma(V::all(255.0f), sum, V::to_float(products[1][t]));
            sum = V::mul(V::all(in.steps[t * in.step_count + point]), sum);
            sum = V::sub(sum, V::all(static_cast<float>(half) * in.sums[t * in.groups + point]));
            total[t] = V::fma(factor, sum, total[t]);
        }
        clear();
    }

    template <int... i>
    BITMILL_INLINE void chunk(std::integer_sequence<int, i...>, const uint8_t* codes, const uint8_t* gains,
                              int64_t c) {
        (block<i>(codes, gains, c), ...);
    }

    BITMILL_INLINE void run(int64_t tile, float* y, int64_t stride) {
        const int64_t chunks = w.layout.chunks();
        const uint8_t* codes = w.codes + tile * w.layout.tile_bytes();
        const uint8_t* gains = w.gains + tile * chunks * 16;
        for (auto& t : total) t = V::zero();
        clear();
        for (int64_t c = 0; c < chunks; ++c, codes += 64 * bits, gains += 16) {
            prefetch<64 * bits>(codes);
            chunk(std::make_integer_sequence<int, 8>{}, codes, gains, c);
        }
        for (int t = 0; t < T; ++t) store_rows<V>(w, total[t], tile, y + t * stride);
    }
};

template <class V, int bits, Act act>
struct PointKind {
    template <int T>
    using Tile = PointTile<V, bits, act, T>;
};

// Adds the products of odd points with x (tokens, columns of whole points).
inline void add_odd(const Points& w, const float* x, int64_t tokens, float* y, int64_t first, int64_t last) {
    const int64_t columns = w.layout.columns;
    for (int64_t row = first; row < last; ++row)
        for (int64_t o = w.odd_starts[row]; o < w.odd_starts[row + 1]; ++o) {
            const int8_t* point = w.odd_points + 16 * o;
            int power = 0;
            for (int i = 0; i < 16; ++i) power += point[i] * point[i];
            const float factor = w.scale_of(row) * w.lengths[w.odd_gain(row, o)] /
                                 std::sqrt(static_cast<float>(power));
            for (int64_t t = 0; t < tokens; ++t) {
                const float* in = x + t * columns + 16 * w.odd_places[o];
                float sum = 0;
                for (int i = 0; i < 16; ++i) sum += static_cast<float>(point[i]) * in[i];
                y[t * w.layout.rows + row] += factor * sum;
            }
        }
}

template <class V, int bits>
void point_rows(const Points& w, float* out, int64_t columns, int64_t first, int64_t last) {
    const Layout& l = w.layout;
    std::vector<uint8_t> codes(16 * l.padded_columns());
    int64_t unpacked = -1;
    for (int64_t row = first; row < last; ++row, out += columns) {
        if (row / 16 != unpacked) {
            unpacked = row / 16;
            unpack_tile<V, bits>(l, w.codes + unpacked * l.tile_bytes(), codes.data());
        }
        int64_t odd = w.odd_starts[row];
        const float scale = w.scale_of(row);
        for (int64_t p = 0; 16 * p < columns; ++p) {
            const uint8_t* code = codes.data() + row % 16 * l.padded_columns() + 16 * p;
            float y[16], point[16];
            const bool is_odd = odd < w.odd_starts[row + 1] && w.odd_places[odd] == p;
            int power = 0;
            for (int i = 0; i < 16; ++i) {
                const int value = is_odd ? w.odd_points[16 * odd + i] : code[i] - (1 << (bits - 1));
                power += value * value;
                y[i] = static_cast<float>(value);
            }
            odd += is_odd;
            const float norm = std::sqrt(static_cast<float>(power)), length = w.lengths[w.gain(row, p)];
            for (int i = 0; i < 16; ++i) point[i] = y[i] / norm * length * scale;  // rounded as Pyramid::points
            std::memcpy(out + 16 * p, point, (columns - 16 * p < 16 ? columns - 16 * p : 16) * sizeof(float));
        }
    }
}

template <class V>
void points_linear_with(const Points& w, const Inputs& in, Act act, int64_t tokens, float* y, int64_t first,
                        int64_t last) {
    const auto run = [&](auto bits) {
        constexpr int b = decltype(bits)::value;
        if (act == Act::int8) tiles_of<V, PointKind<V, b, Act::int8>>(w, in, tokens, y, first, last);
        else tiles_of<V, PointKind<V, b, Act::int16>>(w, in, tokens, y, first, last);
    };
    if (w.layout.bits == 3) run(std::integral_constant<int, 3>{});
    else if (w.layout.bits == 4) run(std::integral_constant<int, 4>{});
    else run(std::integral_constant<int, 5>{});
}

template <class V>
void points_decode_with(const Points& w, float* out, int64_t columns, int64_t first, int64_t last) {
    (w.layout.bits == 3 ? point_rows<V, 3> : w.layout.bits == 4 ? point_rows<V, 4> : point_rows<V, 5>)(
        w, out, columns, first, last);
}

}  // namespace bitmill
