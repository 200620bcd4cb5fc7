// Products in fixed point of every instruction set against plain sums in fp64.
#include "../fixed/fixed.h"

#include <algorithm>

#include "../isa.h"
#include "driver.h"

namespace bitmill {
namespace {

void run(int64_t tokens, int64_t rows, int64_t columns) {
    const int64_t first = 3, stride = rows + 5;  // outputs are a part of wider rows
    const auto x = random_floats(tokens * columns), W = random_floats(rows * columns);
    std::vector<double> expected(tokens * rows), size(tokens * rows);
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < columns; ++c) {
                const double product = static_cast<double>(x[t * columns + c]) * W[r * columns + c];
                expected[t * rows + r] += product, size[t * rows + r] += std::fabs(product);
            }
    for (const auto& name : available_isas()) {
        use_isa(name);
        FixedInputs inputs;
        std::vector<float> y(tokens * stride, NAN), found(tokens * rows);
        fixed_inputs(fixed_shape(columns), {x.data(), nullptr, nullptr, 0}, tokens, inputs, 2);
        fixed_product(inputs, W.data(), rows, y.data() + first, stride, 2);
        int touched = 0;
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t r = 0; r < stride; ++r) {
                if (r >= first && r < first + rows) found[t * rows + r - first] = y[t * stride + r];
                else touched += !std::isnan(y[t * stride + r]);
            }
        double off = 0;  // relative to what is summed: sums may cancel
        for (size_t i = 0; i < found.size(); ++i)
            off = std::isnan(found[i]) ? NAN : std::max(off, std::fabs(found[i] - expected[i]) / (size[i] + 1e-30));
        report(off, 4e-4, "fixed point %s: %ld tokens, %ld x %ld", name.c_str(),
               static_cast<long>(tokens), static_cast<long>(rows), static_cast<long>(columns));
        report(touched, 0, "fixed point %s writes elsewhere", name.c_str());
    }
}

}  // namespace

void test_fixed() {
    for (const int64_t tokens : {1, 2, 7, 31})
        for (const int64_t rows : {1, 16, 37})
            for (const int64_t columns : {1, 63, 64, 200}) run(tokens, rows, columns);
}

}  // namespace bitmill
