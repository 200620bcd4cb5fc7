// Decoded rows alike on every instruction set, and their products against fp64; points are tested from Python.
#include "../vector/vector.h"

#include <cstring>

#include "../isa.h"
#include "driver.h"

namespace bitmill {
namespace {

// x W^T in fp64, W (rows, columns) and x (tokens, columns).
std::vector<double> products(const std::vector<float>& W, const std::vector<float>& x, int64_t tokens,
                             int64_t rows) {
    const int64_t columns = static_cast<int64_t>(W.size()) / rows;
    std::vector<double> y(tokens * rows);
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = 0; i < rows * columns; ++i)
            y[t * rows + i / columns] += static_cast<double>(W[i]) * x[t * columns + i % columns];
    return y;
}

void run(VectorSet set, int bits, int64_t rows, int64_t columns, int64_t group, bool own_scales) {
    const int width = set == VectorSet::e8 ? 8 : 16, block_bits = set == VectorSet::e8 ? 16 : 16 * bits + 4;
    const int64_t blocks = (columns + width - 1) / width, words = (blocks * block_bits + 31) / 32;
    const int64_t groups = (blocks * width + group - 1) / group;
    const auto bytes = random_bytes(rows * words * 4);
    std::vector<uint32_t> stored(rows * words);
    std::memcpy(stored.data(), bytes.data(), bytes.size());
    const auto scales = random_floats((own_scales ? rows : 1) * groups);
    auto table = random_floats(set == VectorSet::e8 ? 256 * 8 : 16);
    for (auto& v : table) v = 0.5f + static_cast<float>(below(3));
    const Vectors w{set,           rows,   columns,    group, stored.data(), words,
                    scales.data(), groups, own_scales, bits,  table.data()};
    const int tokens = 3;
    const auto x = random_floats(tokens * columns);
    std::vector<float> W(rows * columns, NAN);
    use_isa("scalar");
    vector_decode(w, 0, rows, W.data(), 1);
    const auto expected = products(W, x, tokens, rows);
    for (const auto& name : available_isas()) {
        use_isa(name);
        std::vector<float> y(tokens * rows, NAN), again(W.size(), NAN);
        vector_linear(w, x.data(), tokens, y.data(), 2);
        vector_decode(w, 0, 1, again.data(), 2);
        vector_decode(w, 1, rows - 1, again.data() + columns, 2);
        const char* what = set == VectorSet::e8 ? "e8" : "pyramid";
        report(difference(again, W), 0, "%s %s: decode %d bits", what, name.c_str(), bits);
        report(difference(y, expected), 1e-5, "%s %s: %ld x %ld, %d bits", what, name.c_str(),
               static_cast<long>(rows), static_cast<long>(columns), bits);
    }
}

// Codes and points alike on every instruction set, of vectors of all sizes; codes as stored give the points again.
void run_nearest(int bits, int64_t count) {
    const int digits = 4 * bits + 1;
    auto x = random_floats(count * 16);
    for (int64_t i = 0; i < count * 16; ++i) x[i] *= i / 16 % 7 == 0 ? 0.0f : static_cast<float>(1 + i % 5);
    std::vector<float> lengths(16), expected(x.size());
    for (int i = 0; i < 16; ++i) lengths[i] = 2 + 0.25f * static_cast<float>(i);
    std::vector<uint8_t> codes(count * digits);
    use_isa("scalar");
    nearest_points(bits, lengths.data(), count, x.data(), codes.data(), expected.data(), 1);
    for (const auto& name : available_isas()) {
        use_isa(name);
        std::vector<float> found(x.size(), NAN);
        std::vector<uint8_t> again(codes.size());
        nearest_points(bits, lengths.data(), count, x.data(), again.data(), found.data(), 2);
        report(difference(found, expected) + static_cast<double>(again != codes), 0, "nearest %s: %d bits", name.c_str(),
               bits);
    }
}

// Repacked points against decoded rows, the packed words again, and every instruction set alike.
void run_points(int bits, int64_t rows, int64_t columns) {
    const int64_t points = (columns + 15) / 16, words = (points * (16 * bits + 4) + 31) / 32,
                  width = 16 * points;
    constexpr int pulses[] = {4, 12, 27, 58};
    std::vector<int8_t> y(rows * width, 0), back(y.size());
    std::vector<uint8_t> gains(rows * points), gains_back(gains.size());
    for (int64_t p = 0; p < rows * points; ++p) {
        gains[p] = static_cast<uint8_t>(below(16));
        for (int k = 0, place = 0; k < pulses[bits - 1]; ++k) {
            if (p % 7) place = below(16);  // or all in one coordinate
            int8_t& v = y[16 * p + place];
            v = static_cast<int8_t>(v ? v + (v > 0 ? 1 : -1) : below(2) ? 1 : -1);
        }
    }
    std::vector<uint32_t> stored(rows * words, 0);
    numbers(bits, rows, points, y.data(), gains.data(), stored.data(), words, 2);
    const auto scales = random_floats(rows), x = random_floats(5 * columns);
    auto lengths = random_floats(16);
    for (int i = 16; i < 256; ++i) lengths.push_back(lengths[i % 16]);
    const Vectors packed{VectorSet::pyramid, rows, columns, width, stored.data(), words,
                         scales.data(),      1,    true,    bits,  lengths.data()};
    const Layout l{rows, width, 16, bits + 1, 16, 4};
    const int half = 1 << bits;
    std::vector<uint8_t> codes(y.size()), pairs(l.tiles() * l.chunks() * 16), laid(l.tiles() * l.tile_bytes());
    std::vector<int32_t> starts{0}, places;
    std::vector<int8_t> odd;
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t p = 0; p < points; ++p) {
            const int8_t* point = y.data() + row * width + 16 * p;
            bool beyond = false;
            for (int i = 0; i < 16; ++i) beyond = beyond || point[i] >= half || point[i] <= -half;
            for (int i = 0; i < 16; ++i)
                codes[row * width + 16 * p + i] = beyond ? 0 : static_cast<uint8_t>(point[i] + half);
            if (beyond) places.push_back(static_cast<int32_t>(p)), odd.insert(odd.end(), point, point + 16);
            pairs[(row / 16 * l.chunks() + p / 2) * 16 + row % 16] |= static_cast<uint8_t>(
                gains[row * points + p] << 4 * (p % 2));
        }
        starts.push_back(static_cast<int32_t>(places.size()));
    }
    bytes_to_layout(l, codes.data(), laid.data(), 2);
    const Points w{l,    laid.data(),   pairs.data(),  lengths.data(), scales.data(),
                   true, starts.data(), places.data(), odd.data()};
    std::vector<float> W(rows * columns, NAN);
    use_isa("scalar");
    vector_decode(packed, 0, rows, W.data(), 1);
    for (const auto& name : available_isas()) {
        use_isa(name);
        coordinates(packed, back.data(), gains_back.data(), 2);
        report(back == y && gains_back == gains ? 0 : 1, 0, "points %s: numbers, %d bits", name.c_str(), bits);
        std::vector<float> again(W.size(), NAN);
        points_decode(w, columns, 0, 1, again.data(), 2);
        points_decode(w, columns, 1, rows - 1, again.data() + columns, 2);
        report(difference(again, W), 0, "points %s: decode %d bits", name.c_str(), bits);
        for (const Act act : {Act::int8, Act::int16}) {
            std::vector<float> out(5 * rows, NAN);
            points_linear(w, x.data(), columns, 5, act, out.data(), 2);
            report(difference(out, products(W, x, 5, rows)), act == Act::int8 ? 2e-2 : 1e-4,
                   "points %s: %ld x %ld, %d bits", name.c_str(), static_cast<long>(rows),
                   static_cast<long>(columns), bits);
        }
    }
}

// One coordinate of the lattice, in the layout of vector/lattice-inl.h.
float lattice_weight(const Lattice& w, int64_t row, int64_t column) {
    const int64_t square = row / 16 * w.layout.chunks() + column / 32;
    const uint8_t* at = w.codes + square * Lattice::square_bytes + row % 16 * 4 + column % 32 / 8;
    const int i = static_cast<int>(column % 8), pattern = at[0], rest = at[64];
    int sum = 0, negative = 0, size[8];
    for (int c = 0; c < 8; ++c) {
        size[c] = w.sizes[256 * (c % 4 / 2) + pattern] >> (2 * (c % 2) + 4 * (c / 4)) & 3;
        sum += size[c];
        if (c < 7) negative += rest >> c & 1;
    }
    const bool minus = i < 7 ? rest >> i & 1 : (sum + negative) & 1;
    const float absolute = 0.5f + static_cast<float>(size[i]);
    return ((minus ? -absolute : absolute) + (rest >> 7 ? 0.25f : -0.25f)) * w.scale_of(row);
}

void run_lattice(int64_t rows, int64_t columns, bool own_scales) {
    const int64_t width = (columns + 31) / 32 * 32;
    const Layout l{rows, width, width, 2, 16, static_cast<int>(width / 4)};
    const auto codes = random_bytes(l.tiles() * l.tile_bytes());
    std::vector<uint8_t> sizes(512);
    for (auto& s : sizes) s = static_cast<uint8_t>(below(3) | below(3) << 2 | below(3) << 4 | below(3) << 6);
    const auto scales = random_floats(own_scales ? rows : 1), x = random_floats(5 * columns);
    const Lattice w{l, codes.data(), sizes.data(), scales.data(), own_scales};
    std::vector<float> W(rows * columns);
    for (int64_t i = 0; i < rows * columns; ++i) W[i] = lattice_weight(w, i / columns, i % columns);
    for (const auto& name : available_isas()) {
        use_isa(name);
        std::vector<float> again(W.size(), NAN);
        lattice_decode(w, columns, 0, 1, again.data(), 2);
        lattice_decode(w, columns, 1, rows - 1, again.data() + columns, 2);
        report(difference(again, W), 0, "lattice %s: decode", name.c_str());
        for (const Act act : {Act::int8, Act::int16}) {
            std::vector<float> out(5 * rows, NAN);
            lattice_linear(w, x.data(), columns, 5, act, out.data(), 2);
            report(difference(out, products(W, x, 5, rows)), act == Act::int8 ? 2e-2 : 1e-4,
                   "lattice %s: %ld x %ld", name.c_str(), static_cast<long>(rows),
                   static_cast<long>(columns));
        }
    }
}

}  // namespace

void test_vector() {
    for (const bool own : {false, true}) {
        run(VectorSet::e8, 2, 3, 7, own ? 8 : 1 << 30, own);
        run(VectorSet::e8, 2, 9, 1100, 40, own);
        for (int bits = 1; bits <= 4; ++bits) {
            run(VectorSet::pyramid, bits, 3, 7, own ? 16 : 1 << 30, own);
            run(VectorSet::pyramid, bits, 9, 1100, 48, own);
        }
    }
    for (const bool own : {false, true}) {
        run_lattice(3, 7, own);
        run_lattice(37, 1100, own);
    }
    for (int bits = 1; bits <= 4; ++bits) run_nearest(bits, 301);
    for (int bits = 2; bits <= 4; ++bits) {
        run_points(bits, 3, 7);
        run_points(bits, 37, 1100);
    }
}

}  // namespace bitmill
