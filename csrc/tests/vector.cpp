// Decoded rows alike on every instruction set, and their products against fp64; points are tested from Python.
#include "../vector/vector.h"

#include <cstring>

#include "../isa.h"
#include "driver.h"

namespace bitmill {
namespace {

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
    const Vectors w{set, rows, columns, group, stored.data(), words, scales.data(), groups, own_scales, bits, table.data()};
    const int tokens = 3;
    const auto x = random_floats(tokens * columns);
    std::vector<float> W(rows * columns, NAN);
    use_isa("scalar");
    vector_decode(w, 0, rows, W.data(), 1);
    std::vector<double> expected(tokens * rows);
    for (int t = 0; t < tokens; ++t)
        for (int64_t i = 0; i < rows * columns; ++i)
            expected[t * rows + i / columns] += static_cast<double>(W[i]) * x[t * columns + i % columns];
    for (const auto& name : available_isas()) {
        use_isa(name);
        std::vector<float> y(tokens * rows, NAN), again(W.size(), NAN);
        vector_linear(w, x.data(), tokens, y.data(), 2);
        vector_decode(w, 0, 1, again.data(), 2);
        vector_decode(w, 1, rows - 1, again.data() + columns, 2);
        const char* what = set == VectorSet::e8 ? "e8" : "pyramid";
        report(difference(again, W), 0, "%s %s: decode %d bits", what, name.c_str(), bits);
        report(difference(y, expected), 1e-5, "%s %s: %ld x %ld, %d bits", what, name.c_str(), static_cast<long>(rows),
               static_cast<long>(columns), bits);
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
}

}  // namespace bitmill
