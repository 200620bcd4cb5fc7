// The decode step in the Python module. Arguments keep the memory they refer to alive.
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <memory>

#include "bind_decoder.h"
#include "lut/linear.h"

namespace bitmill {

using namespace nb::literals;

namespace {

template <class T, class... Arguments>
std::unique_ptr<Linear> made(Arguments&&... arguments) {
    return std::make_unique<T>(std::forward<Arguments>(arguments)...);
}

std::unique_ptr<LookupLinear> lookup(const Layout& l, int source, bool wide, bool mirrored,
                                     int64_t record_bytes, int64_t records_per_tile, int bank_bits,
                                     float zero, Bytes codes, Bytes tables, Some ids, MaybeFloats powers,
                                     Some scales, Some zeros, Floats row_scales, int act) {
    const Weights weights = lookup_weights(l, source, wide, mirrored, record_bytes, records_per_tile,
                                           bank_bits, zero, codes, tables, ids, powers, scales, zeros,
                                           row_scales, act);
    return std::make_unique<LookupLinear>(weights, static_cast<Act>(act));
}

template <class Number>
void check_product(int64_t rows, int64_t columns, const Array<const Number, 2>& x, const Array<float, 2>& y) {
    require(static_cast<int64_t>(x.shape(1)) == columns && static_cast<int64_t>(y.shape(1)) == rows && x.shape(0) == y.shape(0),
            "x or y has another shape");
}

void product(const LookupLinear& matrix, Array<const float, 2> x, Array<float, 2> y, int threads) {
    check_product(matrix.rows, matrix.columns, x, y);
    nb::gil_scoped_release free;
    linear(matrix.matrix(), x.data(), x.shape(0), matrix.inputs(), y.data(), threads);
}

void grid_product(const GridLinear& linear, Array<const float, 2> x, Array<float, 2> y, int threads) {
    check_product(linear.rows, linear.columns, x, y);
    nb::gil_scoped_release free;
    linear.product(x.data(), x.shape(0), y.data(), threads);
}

// Weights that multiply with many tokens (lut/linear.h: linear_gemm).
struct PanelLinear : Panels {
    void product(Array<const float, 2> x, Array<float, 2> y, int act, int64_t step, int threads) const {
        check_product(weights.layout.rows, weights.layout.columns, x, y);
        require((act == 0 || act == 1) && 0 <= step, "inputs are rounded to int8 or int16, in steps of some columns");
        nb::gil_scoped_release free;
        linear_gemm(weights, {x.data(), nullptr, nullptr, 0}, x.shape(0), static_cast<Act>(act), step, y.data(), threads);
    }

    // Of inputs that are integers: x (tokens, columns), with the steps (tokens, n) of `step` columns each.
    void product_of_codes(Array<const int8_t, 2> x, Array<const float, 2> steps, Array<float, 2> y, int64_t step, int threads) const {
        const int64_t columns = weights.layout.columns;
        check_product(weights.layout.rows, columns, x, y);
        require(0 < step && steps.shape(0) == x.shape(0) && static_cast<int64_t>(steps.shape(1)) == (columns - 1) / step + 1,
                "steps have another shape");
        nb::gil_scoped_release free;
        const FixedSource codes{nullptr, x.data(), steps.data(), static_cast<int64_t>(steps.shape(1))};
        linear_gemm(weights, codes, x.shape(0), Act::int8, step, y.data(), threads);
    }
};

std::shared_ptr<PanelLinear> panels(const Layout& l, int source, bool wide, bool mirrored, int64_t record_bytes,
                                    int64_t records_per_tile, int bank_bits, float zero, Bytes codes, Bytes tables,
                                    Some ids, MaybeFloats powers, Some scales, Some zeros, Floats row_scales, int act) {
    const Weights weights = lookup_weights(l, source, wide, mirrored, record_bytes, records_per_tile,
                                           bank_bits, zero, codes, tables, ids, powers, scales, zeros,
                                           row_scales, act);
    require(act != static_cast<int>(Act::float32) && has_gemm(weights), "many tokens need tables of bytes");
    return std::make_shared<PanelLinear>(PanelLinear{{weights}});
}

void read_pieces(LookupLinear& matrix, std::shared_ptr<PanelLinear> panels, int act, int64_t step, std::shared_ptr<Codes> codes) {
    require((act == 0 || act == 1) && 0 <= step, "inputs are rounded to int8 or int16, in steps of some columns");
    const auto fits = [&](const Layout& l) { return l.rows == matrix.rows && l.columns == matrix.columns; };
    require((!panels || fits(panels->weights.layout)) && (!codes || fits(codes->levels.layout)), "the matrix has another shape");
    matrix.read_pieces(std::move(panels), static_cast<Act>(act), step, std::move(codes));
}

// A function of the arguments of lookup_weights.
template <class Function>
void def_of_weights(nb::module_& m, const char* name, const Function& function) {
    m.def(name, function, "layout"_a, "source"_a, "wide"_a, "mirrored"_a, "record_bytes"_a,
          "records_per_tile"_a, "bank_bits"_a, "zero"_a, "codes"_as_is, "tables"_as_is, "ids"_as_is.none(),
          "powers"_as_is.none(), "scales"_as_is.none(), "zeros"_as_is.none(), "row_scales"_as_is, "act"_a,
          nb::keep_alive<0, 9>(), nb::keep_alive<0, 10>(), nb::keep_alive<0, 11>(), nb::keep_alive<0, 12>(),
          nb::keep_alive<0, 13>(), nb::keep_alive<0, 14>(), nb::keep_alive<0, 15>());
}

void check_places(const Array<const int64_t, 1>& places, int64_t count) {
    for (size_t i = 0; i < places.size(); ++i)
        require(0 <= places.data()[i] && places.data()[i] < count, "a column is out of range");
}

const uint16_t* fp16(const Array<const int16_t, 2>& numbers) { return reinterpret_cast<const uint16_t*>(numbers.data()); }

std::vector<float> row_of(const Linear& table, int64_t row) {
    require(0 <= row && row < table.rows, "a row is out of range");
    std::vector<float> out(table.columns);
    if (!table.row(row, out.data())) out.clear();
    return out;
}

}  // namespace

void bind_step(nb::module_& m) {
    nb::class_<Linear>(m, "Linear").def("row", row_of, "row"_a);
    nb::class_<LookupLinear, Linear>(m, "LookupLinear")
        .def("product", product, "x"_as_is, "y"_as_is, "threads"_a)
        .def("read_pieces", read_pieces, "panels"_a.none(), "act"_a, "step"_a, "codes"_a.none());
    nb::class_<Codes>(m, "Codes");
    m.def(
        "codes",
        [](const Layout& l, Bytes codes, Floats tables, std::optional<Array<const int32_t, 2>> ids, Array<const float, 2> scales,
           Array<const float, 2> zeros) {
            return std::make_shared<Codes>(Codes{levels(l, codes, tables, ids, scales, zeros, 0, l.rows)});
        },
        "layout"_a, "codes"_as_is, "tables"_as_is, "ids"_as_is.none(), "scales"_as_is, "zeros"_as_is, nb::keep_alive<0, 2>(),
        nb::keep_alive<0, 3>(), nb::keep_alive<0, 4>(), nb::keep_alive<0, 5>(), nb::keep_alive<0, 6>());
    nb::class_<PanelLinear>(m, "PanelLinear")
        .def("product", &PanelLinear::product, "x"_as_is, "y"_as_is, "act"_a, "step"_a, "threads"_a)
        .def("product_of_codes", &PanelLinear::product_of_codes, "x"_as_is, "steps"_as_is, "y"_as_is, "step"_a, "threads"_a);
    def_of_weights(m, "lookup_linear", lookup);
    def_of_weights(m, "panel_linear", panels);
    nb::class_<GridLinear, Linear>(m, "GridLinear")
        .def("product", grid_product, "x"_as_is, "y"_as_is, "threads"_a);
    m.def(
        "grid_linear",
        [](const LookupLinear& matrix, int bits, int64_t width, bool symmetric, float scale, float zero, float threshold) {
            require(0 <= scale && scale < 1e30f && 0 <= zero && zero < 256, "there is no such grid");
            require(0 < width && width <= matrix.columns, "a scale covers 1 to all columns");
            require(0 <= threshold, "a threshold is a magnitude");
            return std::make_unique<GridLinear>(matrix.matrix(), Grid{bits, width, symmetric, scale, zero, threshold});
        },
        "matrix"_a, "bits"_a, "width"_a, "symmetric"_a, "scale"_a, "zero"_a, "threshold"_a = 0.0f, nb::keep_alive<0, 1>());
    m.def(
        "lookup_columns",
        [](const LookupLinear& matrix, Array<const int64_t, 1> columns, Array<float, 2> out, int threads) {
            const int64_t count = columns.size();
            check_places(columns, matrix.columns);
            require(static_cast<int64_t>(out.shape(0)) == matrix.rows && static_cast<int64_t>(out.shape(1)) == count,
                    "out has another shape");
            nb::gil_scoped_release free;
            matrix.column_numbers(columns.data(), count, out.data(), threads);
        },
        "matrix"_a, "columns"_as_is, "out"_as_is, "threads"_a);
    m.def(
        "dense_linear",
        [](Array<const float, 2> weights) {
            return made<DenseLinear>(weights.data(), true, weights.shape(0), weights.shape(1));
        },
        "weights"_as_is, nb::keep_alive<0, 1>());
    m.def(
        "bf16_linear",
        [](Array<const int16_t, 2> weights) {
            return made<DenseLinear>(weights.data(), false, weights.shape(0), weights.shape(1));
        },
        "weights"_as_is, nb::keep_alive<0, 1>());
    m.def(
        "transposed_linear",
        [](Array<const float, 2> weights) {
            return made<TransposedLinear>(weights.data(), weights.shape(1), weights.shape(0));
        },
        "weights"_as_is, nb::keep_alive<0, 1>());
    m.def(
        "step_vector_linear",
        [](int set, int64_t columns, int64_t group, int bits, Array<const int32_t, 2> words,
           Array<const float, 2> scales, Floats table) {
            return made<VectorLinear>(vectors(set, columns, group, bits, words, scales, table));
        },
        "set"_a, "columns"_a, "group"_a, "bits"_a, "words"_as_is, "scales"_as_is, "table"_as_is,
        nb::keep_alive<0, 5>(), nb::keep_alive<0, 6>(), nb::keep_alive<0, 7>());
    m.def(
        "step_points_linear",
        [](const Layout& l, int64_t columns, Bytes codes, Bytes gains, Floats lengths, Floats scales,
           Array<const int32_t, 1> starts, Array<const int32_t, 1> places, Array<const int8_t, 2> odd,
           int act) {
            require(0 <= act && act <= 1, "there are no such inputs");
            return made<PointsLinear>(points(l, codes, gains, lengths, scales, starts, places, odd, columns),
                                      columns, static_cast<Act>(act));
        },
        "layout"_a, "columns"_a, "codes"_as_is, "gains"_as_is, "lengths"_as_is, "scales"_as_is,
        "starts"_as_is, "places"_as_is, "odd"_as_is, "act"_a, nb::keep_alive<0, 3>(), nb::keep_alive<0, 4>(),
        nb::keep_alive<0, 5>(), nb::keep_alive<0, 6>(), nb::keep_alive<0, 7>(), nb::keep_alive<0, 8>(),
        nb::keep_alive<0, 9>());
    m.def(
        "step_lattice_linear",
        [](const Layout& l, int64_t columns, Bytes codes, Bytes sizes, Floats scales, int act) {
            require(0 <= act && act <= 1, "there are no such inputs");
            return made<LatticeLinear>(lattice(l, codes, sizes, scales, columns), columns,
                                       static_cast<Act>(act));
        },
        "layout"_a, "columns"_a, "codes"_as_is, "sizes"_as_is, "scales"_as_is, "act"_a,
        nb::keep_alive<0, 3>(), nb::keep_alive<0, 4>(), nb::keep_alive<0, 5>());
    m.def(
        "additive_linear",
        [](const Layout& l, int64_t columns, Bytes codes, Array<const float, 3> books, Bytes scales) {
            return made<AdditiveLinear>(additive_weights(l, codes, books, scales, columns), columns);
        },
        "layout"_a, "columns"_a, "codes"_as_is, "books"_as_is, "scales"_as_is, nb::keep_alive<0, 3>(),
        nb::keep_alive<0, 4>(), nb::keep_alive<0, 5>());
    using Steps = Array<const int64_t, 2>;
    using Orders = Array<const int32_t, 1>;
    m.def(
        "rotated_linear",
        [](const Linear& inner, MaybeFloats rescale, Steps steps, Floats values, Orders orders,
           Steps out_steps, Floats out_values, Orders out_orders) {
            return made<RotatedLinear>(inner, numbers(rescale, inner.columns, "a scale has another size"),
                                       rotation(steps, values, orders, inner.columns),
                                       rotation(out_steps, out_values, out_orders, inner.rows));
        },
        "inner"_a, "rescale"_as_is.none(), "steps"_as_is, "numbers"_as_is, "orders"_as_is, "out_steps"_as_is,
        "out_numbers"_as_is, "out_orders"_as_is, nb::keep_alive<0, 1>(), nb::keep_alive<0, 2>(),
        nb::keep_alive<0, 3>(), nb::keep_alive<0, 4>(), nb::keep_alive<0, 5>(), nb::keep_alive<0, 6>(),
        nb::keep_alive<0, 7>(), nb::keep_alive<0, 8>());
    m.def(
        "sum_linear",
        [](const Linear& inner, Array<const int64_t, 1> starts, Bytes places,
           Array<const uint8_t, 1> values) {
            return made<SumLinear>(inner, sparse(starts, places, values, inner.rows, inner.columns));
        },
        "inner"_a, "starts"_as_is, "places"_as_is, "values"_as_is, nb::keep_alive<0, 1>(),
        nb::keep_alive<0, 2>(), nb::keep_alive<0, 3>(), nb::keep_alive<0, 4>());
    m.def(
        "permuted_linear",
        [](const Linear& inner, Array<const int64_t, 1> order) {
            require(static_cast<int64_t>(order.size()) == inner.columns, "an order has another size");
            check_places(order, inner.columns);
            return made<PermutedLinear>(inner, order.data());
        },
        "inner"_a, "order"_as_is, nb::keep_alive<0, 1>(), nb::keep_alive<0, 2>());
    using Halves = Array<const int16_t, 2>;  // fp16
    m.def(
        "outlier_linear",
        [](const Linear& inner, Array<const int64_t, 1> base, Array<const int64_t, 1> outliers, Halves values) {
            const int64_t count = outliers.size();
            require(static_cast<int64_t>(base.size()) == inner.columns, "the base has another size");
            check_places(base, inner.columns + count);
            check_places(outliers, inner.columns + count);
            require(static_cast<int64_t>(values.shape(0)) == inner.rows && static_cast<int64_t>(values.shape(1)) == count,
                    "values have another shape");
            return made<OutlierLinear>(inner, base.data(), outliers.data(), fp16(values), count);
        },
        "inner"_a, "base"_as_is, "outliers"_as_is, "values"_as_is, nb::keep_alive<0, 1>(), nb::keep_alive<0, 2>(),
        nb::keep_alive<0, 3>(), nb::keep_alive<0, 4>());
    m.def(
        "low_rank_linear",
        [](const Linear& inner, Halves left, Halves right) {
            require(static_cast<int64_t>(left.shape(0)) == inner.rows && left.shape(1) == right.shape(0) &&
                        static_cast<int64_t>(right.shape(1)) == inner.columns,
                    "factors have another shape");
            return made<LowRankLinear>(inner, fp16(left), fp16(right), static_cast<int64_t>(right.shape(0)));
        },
        "inner"_a, "left"_as_is, "right"_as_is, nb::keep_alive<0, 1>(), nb::keep_alive<0, 2>(), nb::keep_alive<0, 3>());
    bind_decoder(m);
}

}  // namespace bitmill
