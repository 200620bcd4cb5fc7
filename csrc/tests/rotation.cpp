// Every step of a rotation against the matrix that it means, in fp64.
#include "../rotation/rotation.h"

#include "../isa.h"
#include "driver.h"

namespace bitmill {
namespace {

void run(const Turn turn, int64_t start, int64_t order, int64_t inner, int64_t outer) {
    const int64_t width = order * inner * outer, tokens = 2, all = start + width + 3;
    const bool is_matrix = turn == Turn::matrix, is_axis = is_matrix || turn == Turn::butterflies;
    const auto numbers = random_floats(is_matrix ? order * padded_order(order) : width);
    std::vector<int32_t> places(width);
    for (auto& p : places) p = below(static_cast<int>(width));
    const RotationStep step{turn, start, width, order, inner, 0};
    const auto x = random_floats(tokens * all);
    std::vector<double> expected(x.begin(), x.end());
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = 0; i < width; ++i) {
            const float* in = x.data() + t * all + start;
            double& out = expected[t * all + start + i];
            if (!is_axis) {
                out = turn == Turn::multiply ? static_cast<double>(in[i]) * numbers[i] : in[places[i]];
                continue;
            }
            const int64_t row = i / inner % order;
            out = 0;
            for (int64_t j = 0; j < order; ++j) {
                int64_t both = row & j, sign = 1;
                for (; both; both &= both - 1) sign = -sign;
                out += (is_matrix ? numbers[j * padded_order(order) + row] : sign) * in[i + (j - row) * inner];
            }
        }
    for (const auto& name : available_isas()) {
        use_isa(name);
        std::vector<float> y = x;
        rotate({all, &step, 1, numbers.data(), places.data()}, y.data(), tokens, 2);
        report(difference(y, expected), 1e-5, "rotation %s: turn %d, order %ld, inner %ld", name.c_str(),
               static_cast<int>(turn), static_cast<long>(order), static_cast<long>(inner));
    }
}

}  // namespace

void test_rotation() {
    run(Turn::multiply, 5, 1, 1, 37);
    run(Turn::permute, 5, 1, 1, 37);
    for (const int64_t inner : {16, 48})
        for (const int64_t order : {2, 8, 64}) run(Turn::butterflies, 1, order, inner, 3);
    for (const int64_t inner : {1, 5, 16, 37})
        for (const int64_t order : {1, 3, 16, 20, 64, 130}) run(Turn::matrix, 7, order, inner, 2);
}

}  // namespace bitmill
