// Sparse products against fp64, with rows that are empty and rows that are full.
#include "../sparse/sparse.h"

#include "../isa.h"
#include "driver.h"

namespace bitmill {
namespace {

template <class Place>
void run(int64_t rows, int64_t columns) {
    std::vector<int64_t> starts(1, 0);
    std::vector<Place> places;
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < columns; ++c)
            if (r % 3 == 1 || (r % 3 == 2 && below(4) == 0)) places.push_back(static_cast<Place>(c));
        starts.push_back(static_cast<int64_t>(places.size()));
    }
    std::vector<uint16_t> values(places.size());
    for (auto& v : values) v = static_cast<uint16_t>(0x3800 + below(1024));  // 0.5 to 1
    const int tokens = 3;
    const auto x = random_floats(tokens * columns), before = random_floats(tokens * rows);
    std::vector<double> expected(before.begin(), before.end());
    for (int t = 0; t < tokens; ++t)
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t e = starts[r]; e < starts[r + 1]; ++e)
                expected[t * rows + r] += (0.5 + (values[e] - 0x3800) / 2048.0) * x[t * columns + places[e]];
    for (const auto& name : available_isas()) {
        use_isa(name);
        std::vector<float> y = before;
        sparse_add({rows, columns, starts.data(), places.data(), sizeof(Place) == 4, values.data()}, x.data(), tokens,
                   y.data(), 2);
        report(difference(y, expected), 1e-5, "sparse %s: %ld x %ld", name.c_str(), static_cast<long>(rows),
               static_cast<long>(columns));
    }
}

}  // namespace

void test_sparse() {
    run<uint16_t>(1, 5);
    run<uint16_t>(20, 61);
    run<uint32_t>(20, 61);
}

}  // namespace bitmill
