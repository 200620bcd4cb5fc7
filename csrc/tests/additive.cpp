// Sums of codebook vectors against fp64.
#include "../additive/additive.h"

#include <algorithm>

#include "../isa.h"
#include "../words.h"
#include "driver.h"

namespace bitmill {
namespace {

void run(int64_t rows, int64_t columns, int codebooks, int bits, int64_t group_columns) {
    constexpr int width = 8;
    const int64_t blocks = (columns + width - 1) / width, group = std::min(group_columns / width, blocks) * codebooks;
    const Layout l{rows, blocks * codebooks, group, bits, Additive::rows, static_cast<int>((group + 7) / 8 * 8)};
    const int64_t words = (l.columns * bits + 31) / 32;
    std::vector<uint32_t> packed(rows * words);
    std::vector<uint8_t> codes(rows * l.columns), stored(l.tiles() * l.tile_bytes());
    for (auto& c : codes) c = static_cast<uint8_t>(below(1 << bits));
    for (int64_t r = 0; r < rows; ++r) write_words(&codes[r * l.columns], bits, l.columns, &packed[r * words]);
    to_layout(l, packed.data(), words, stored.data(), 2);
    std::vector<uint32_t> back(packed.size());
    from_layout(l, stored.data(), back.data(), words, 2);
    if (back != packed) throw std::runtime_error("codes do not come back");

    Additive w{l, width, codebooks, stored.data(), nullptr, nullptr};
    const int size = 1 << bits;
    std::vector<float> books(codebooks * width * w.entries());
    for (int m = 0; m < codebooks * width; ++m)
        for (int k = 0; k < w.entries(); ++k)
            books[m * w.entries() + k] = k < size ? random_floats(1)[0] : books[m * w.entries() + k % size];
    std::vector<uint16_t> scales(l.tiles() * l.groups() * Additive::rows);
    for (auto& s : scales) s = static_cast<uint16_t>(0x3800 + below(1024));  // 0.5 to 1
    w.books = books.data(), w.scales = scales.data();

    const int tokens = 3;
    const auto x = random_floats(tokens * columns);
    std::vector<double> expected(tokens * rows), size_of(tokens * rows);
    for (int t = 0; t < tokens; ++t)
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < l.columns; ++c) {
                const int64_t at = (r / 64 * l.groups() + c / group) * 64 + r % 64;
                const double scale = 0.5 + (scales[at] - 0x3800) / 2048.0;
                for (int i = 0; i < width; ++i) {
                    const int64_t column = c / codebooks * width + i;
                    if (column >= columns) break;
                    const double v = books[(c % codebooks * width + i) * w.entries() + codes[r * l.columns + c]];
                    expected[t * rows + r] += scale * v * x[t * columns + column];
                }
            }
    for (const auto& name : available_isas()) {
        use_isa(name);
        std::vector<float> y(tokens * rows, NAN);
        additive(w, x.data(), columns, tokens, y.data(), 2);
        report(difference(y, expected), 2e-3, "additive %s: %ld x %ld, %d books of %d bits, group %ld", name.c_str(),
               static_cast<long>(rows), static_cast<long>(columns), codebooks, bits, static_cast<long>(group_columns));
    }
}

}  // namespace

void test_additive() {
    for (int bits = 1; bits <= 8; ++bits) {
        run(1, 1, 1, bits, 8);
        run(3, 20, 2, bits, 16);
        run(65, 100, 3, bits, 40);
        run(130, 512, 2, bits, 1 << 20);
    }
    run(70, 136, 1, 8, 8);
    run(70, 136, 8, 8, 64);
}

}  // namespace bitmill
