#include "vector.h"

#include <cstring>
#include <vector>

#include "../isa.h"
#include "../simd/scalar.h"
#include "../threads.h"
#include "../words.h"
#include "pyramid-inl.h"
#include "points-inl.h"

namespace bitmill {

void vector_linear(const Vectors& w, const float* x, int64_t tokens, float* y, int threads) {
    thread_local std::vector<float> padded;
    const int64_t columns = w.padded_columns();
    padded.assign(tokens * columns, 0.0f);
    float* in = padded.data();
    for (int64_t t = 0; t < tokens; ++t)
        std::memcpy(in + t * columns, x + t * w.columns, w.columns * sizeof(float));
    const auto& best = *isa().vector;
    parallel_for(w.rows, threads,
              [&](int64_t first, int64_t last) { best.linear(w, in, tokens, y, first, last); });
}

void vector_decode(const Vectors& w, int64_t first, int64_t count, float* out, int threads) {
    const auto& best = *isa().vector;
    parallel_for(count, threads, [&](int64_t from, int64_t to) {
        best.decode(w, out + from * w.columns, first + from, first + to);
    });
}

void coordinates(const Vectors& w, int8_t* y, uint8_t* gains, int threads) {
    const auto& best = *isa().vector;
    const int64_t points = w.padded_columns() / 16;
    parallel_for(w.rows, threads, [&](int64_t first, int64_t last) {
        best.coordinates(w, y + first * points * 16, gains + first * points, first, last);
    });
}

void nearest_points(int bits, const float* lengths, int64_t count, const float* x, uint8_t* codes, float* vectors,
                    int threads) {
    const auto& best = *isa().vector;
    const int useful = static_cast<int>(std::min<int64_t>(threads, count / 128 + 1));  // waking a thread costs as much
    parallel_for(count, useful, [&](int64_t first, int64_t last) {
        best.nearest_points(bits, lengths, last - first, x + first * 16, codes + first * (4 * bits + 1),
                            vectors + first * 16);
    });
}

void trellis_codes(const Trellis& w, int64_t count, const int16_t* x, int kept, uint8_t* codes, int threads) {
    const auto& best = *isa().vector;
    parallel_for(count, threads, [&](int64_t first, int64_t last) {
        best.trellis_codes(w, last - first, x + first * trellis_block, kept, codes + first * trellis_block / 8 * w.bits);
    });
}

bool are_points(int bits, int64_t count, const int8_t* y, const uint8_t* gains) {
    for (int64_t p = 0; p < count; ++p, y += 16) {
        int pulses = 0;
        for (int i = 0; i < 16; ++i) pulses += y[i] < 0 ? -y[i] : y[i];
        if (pulses != pyramid_pulses[bits - 1] || gains[p] > 15) return false;
    }
    return true;
}

void numbers(int bits, int64_t rows, int64_t points, const int8_t* y, const uint8_t* gains, uint32_t* words,
             int64_t words_per_row, int threads) {
    parallel_for(rows, threads, [&](int64_t first, int64_t last) {
        const Pyramid<Scalar> set(bits, nullptr);
        const int digits = 4 * bits + 1;
        std::vector<uint8_t> codes(points * digits);
        for (int64_t row = first; row < last; ++row) {
            for (int64_t p = 0; p < points; ++p) {
                const uint64_t number = set.number(y + (row * points + p) * 16);
                for (int d = 0; d < digits - 1; ++d)
                    codes[p * digits + d] = static_cast<uint8_t>(number >> 4 * d & 15);
                codes[p * digits + digits - 1] = gains[row * points + p];
            }
            write_words(codes.data(), 4, points * digits, words + row * words_per_row);
        }
    });
}

void points_linear(const Points& w, const float* x, int64_t columns, int64_t tokens, Act act, float* y,
                   int threads) {
    thread_local std::vector<float> padded;
    thread_local Buffers buffers;
    const int64_t width = w.layout.columns;
    if (columns < width) {
        padded.assign(tokens * width, 0.0f);
        for (int64_t t = 0; t < tokens; ++t)
            std::memcpy(padded.data() + t * width, x + t * columns, columns * sizeof(float));
        x = padded.data();
    }
    isa().read_inputs(w.layout, x, tokens, act, buffers);
    const Inputs in = buffers.inputs;
    parallel_for(w.layout.tiles(), threads,
              [&](int64_t first, int64_t last) { points_tiles(w, in, x, tokens, act, y, first, last); });
}

void points_tiles(const Points& w, const Inputs& in, const float* x, int64_t tokens, Act act, float* y,
                  int64_t first, int64_t last) {
    isa().vector->points_linear(w, in, act, tokens, y, first, last);
    add_odd(w, x, tokens, y, first * 16, std::min(last * 16, w.layout.rows));
}

void points_decode(const Points& w, int64_t columns, int64_t first, int64_t count, float* out, int threads) {
    const auto& best = *isa().vector;
    parallel_for(count, threads, [&](int64_t from, int64_t to) {
        best.points_decode(w, out + from * columns, columns, first + from, first + to);
    });
}

void lattice_order(const float* x, int64_t columns, float* out, int64_t width) {
    const auto square = [&](int64_t first, const auto& at) {
        for (int i = 0; i < 8; ++i)
            for (int block = 0; block < 4; ++block) out[first + 4 * i + block] = at(first + 8 * block + i);
    };
    int64_t first = 0;
    for (; first + 32 <= columns; first += 32) square(first, [&](int64_t c) { return x[c]; });
    if (first < width) square(first, [&](int64_t c) { return c < columns ? x[c] : 0.0f; });
}

void lattice_linear(const Lattice& w, const float* x, int64_t columns, int64_t tokens, Act act, float* y,
                    int threads) {
    thread_local std::vector<float> ordered;
    thread_local Buffers buffers;
    const int64_t width = w.layout.columns;
    ordered.resize(tokens * width);
    for (int64_t t = 0; t < tokens; ++t)
        lattice_order(x + t * columns, columns, ordered.data() + t * width, width);
    isa().read_inputs(w.layout, ordered.data(), tokens, act, buffers);
    const Inputs in = buffers.inputs;
    const auto& best = *isa().vector;
    parallel_for(w.layout.tiles(), threads,
              [&](int64_t first, int64_t last) { best.lattice_linear(w, in, act, tokens, y, first, last); });
}

void lattice_decode(const Lattice& w, int64_t columns, int64_t first, int64_t count, float* out, int threads) {
    const auto& best = *isa().vector;
    parallel_for(count, threads, [&](int64_t from, int64_t to) {
        best.lattice_decode(w, out + from * columns, columns, first + from, first + to);
    });
}

}  // namespace bitmill
