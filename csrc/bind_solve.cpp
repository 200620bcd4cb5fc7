// The steps of solvers, in Python: solve/solve.h.
#include <nanobind/stl/string.h>

#include "arrays.h"
#include "solve/solve.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace bitmill;

namespace {

Columns columns_of(int64_t count, int64_t rows, const Array<const float, 3>& table,
                   const Array<const float, 3>& middles, const Array<const uint8_t, 3>& codes,
                   const Array<const int32_t, 1>& group) {
    const auto groups = static_cast<int64_t>(table.shape(0)), levels = static_cast<int64_t>(table.shape(1));
    const auto is = [&](const auto& array, int64_t entries) {
        return static_cast<int64_t>(array.shape(0)) == groups && static_cast<int64_t>(array.shape(1)) == entries &&
               static_cast<int64_t>(array.shape(2)) == rows;
    };
    require(1 <= levels && levels <= 256 && is(table, levels) && is(middles, levels - 1) && is(codes, levels) &&
                static_cast<int64_t>(group.shape(0)) == count,
            "the tables are not of the columns");
    for (int64_t k = 0; k < count; ++k)
        require(0 <= group.data()[k] && group.data()[k] < groups, "there is no such group");
    return {count, rows, static_cast<int>(levels), table.data(), middles.data(), codes.data(), group.data()};
}

void feedback_of(Array<const float, 3> table, Array<const float, 3> middles, Array<const uint8_t, 3> level_codes,
                 Array<const int32_t, 1> group, Array<const float, 2> U, Array<float, 2> W, Array<uint8_t, 2> codes,
                 Array<float, 2> errors, int threads) {
    const auto count = static_cast<int64_t>(W.shape(0)), rows = static_cast<int64_t>(W.shape(1));
    const Columns c = columns_of(count, rows, table, middles, level_codes, group);
    require(static_cast<int64_t>(U.shape(0)) == count && static_cast<int64_t>(U.shape(1)) == count &&
                codes.shape(0) == W.shape(0) && codes.shape(1) == W.shape(1) && errors.shape(0) == W.shape(0) &&
                errors.shape(1) == W.shape(1),
            "the arrays are not of the same columns");
    nb::gil_scoped_release free;
    round_with_feedback(c, {U.data(), count, W.data(), codes.data(), errors.data()}, threads);
}

void descend_of(Array<const float, 3> table, Array<const float, 3> middles, Array<const uint8_t, 3> level_codes,
                Array<const int32_t, 1> group, Array<const float, 2> H, Array<const int64_t, 1> place,
                Array<float, 2> gradient, Array<float, 2> Q, Array<uint8_t, 2> codes, Array<float, 2> moved,
                int threads) {
    const auto count = static_cast<int64_t>(gradient.shape(0)), rows = static_cast<int64_t>(gradient.shape(1));
    const Columns c = columns_of(count, rows, table, middles, level_codes, group);
    require(static_cast<int64_t>(H.shape(0)) == count && static_cast<int64_t>(H.shape(1)) == count &&
                static_cast<int64_t>(place.shape(0)) == count && moved.shape(0) == gradient.shape(0) &&
                moved.shape(1) == gradient.shape(1) && static_cast<int64_t>(Q.shape(1)) == rows &&
                codes.shape(0) == Q.shape(0) && codes.shape(1) == Q.shape(1),
            "the arrays are not of the same columns");
    for (int64_t k = 0; k < count; ++k)
        require(0 <= place.data()[k] && place.data()[k] < static_cast<int64_t>(Q.shape(0)), "there is no such column");
    nb::gil_scoped_release free;
    round_by_descent(c, {H.data(), place.data(), gradient.data(), Q.data(), codes.data(), moved.data()}, threads);
}

void codings_of(Array<const float, 2> x, Array<const float, 2> weight, Array<const float, 1> factor,
                Array<const float, 2> costs, Array<float, 1> least, Array<int64_t, 1> coding, int threads) {
    const auto bins = static_cast<int64_t>(costs.shape(0)) / 2, codings = static_cast<int64_t>(costs.shape(1));
    require(4 <= bins && bins <= 512 && costs.shape(0) % 2 == 0 && 1 <= codings && codings <= 64 &&
                weight.shape(0) > 0 && x.shape(0) % weight.shape(0) == 0 && weight.shape(1) == x.shape(1) &&
                factor.shape(0) == x.shape(0) && least.shape(0) == x.shape(0) && coding.shape(0) == x.shape(0),
            "the arrays are not of the same groups");
    nb::gil_scoped_release free;
    cheapest_codings({static_cast<int64_t>(x.shape(0)), static_cast<int64_t>(x.shape(1)), x.data(), weight.data(),
                      static_cast<int64_t>(weight.shape(0)), factor.data(), costs.data(), static_cast<int>(bins),
                      static_cast<int>(codings), least.data(), coding.data()},
                     threads);
}

}  // namespace

namespace bitmill {

void bind_solve(nb::module_& m) {
    m.def("round_with_feedback", feedback_of, "table"_as_is, "middles"_as_is, "level_codes"_as_is, "group"_as_is,
          "U"_as_is, "W"_as_is, "codes"_as_is, "errors"_as_is, "threads"_a);
    m.def("round_by_descent", descend_of, "table"_as_is, "middles"_as_is, "level_codes"_as_is, "group"_as_is,
          "H"_as_is, "place"_as_is, "gradient"_as_is, "Q"_as_is, "codes"_as_is, "moved"_as_is, "threads"_a);
    m.def("cheapest_codings", codings_of, "x"_as_is, "weight"_as_is, "factor"_as_is, "costs"_as_is, "least"_as_is,
          "coding"_as_is, "threads"_a);
}

}  // namespace bitmill
