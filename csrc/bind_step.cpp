// The decode step in the Python module. Arguments keep the memory they refer to alive.
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <memory>

#include "bind_kv.h"
#include "lut/linear.h"

namespace bitmill {

using namespace nb::literals;

namespace {

template <class T, class... Arguments>
std::unique_ptr<Linear> made(Arguments&&... arguments) {
    return std::make_unique<T>(std::forward<Arguments>(arguments)...);
}

using Floats = Array<const float, 1>;
using MaybeFloats = std::optional<Floats>;

std::unique_ptr<LookupLinear> lookup(const Layout& l, int source, bool wide, bool mirrored,
                                     int64_t record_bytes, int64_t records_per_tile, int bank_bits,
                                     float zero, Bytes codes, Bytes tables, Some ids, MaybeFloats powers,
                                     Some scales, Some zeros, Floats row_scales, int act) {
    const Weights weights = lookup_weights(l, source, wide, mirrored, record_bytes, records_per_tile,
                                           bank_bits, zero, codes, tables, ids, powers, scales, zeros,
                                           row_scales, act);
    return std::make_unique<LookupLinear>(weights, static_cast<Act>(act));
}

const float* numbers(const MaybeFloats& values, int64_t count, const char* what) {
    require(!values || static_cast<int64_t>(values->size()) == count, what);
    return values ? values->data() : nullptr;
}

template <class Number>
void check_product(int64_t rows, int64_t columns, const Array<const Number, 2>& x, const Array<float, 2>& y) {
    require(static_cast<int64_t>(x.shape(1)) == columns && static_cast<int64_t>(y.shape(1)) == rows && x.shape(0) == y.shape(0),
            "x or y has another shape");
}

void product(const LookupLinear& linear, Array<const float, 2> x, Array<float, 2> y, int threads) {
    check_product(linear.rows, linear.columns, x, y);
    nb::gil_scoped_release free;
    linear.product(x.data(), x.shape(0), y.data(), threads);
}

// Weights that multiply with many tokens (lut/linear.h: linear_gemm).
struct PanelLinear {
    Weights weights;

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

std::unique_ptr<PanelLinear> panels(const Layout& l, int source, bool wide, bool mirrored, int64_t record_bytes,
                                    int64_t records_per_tile, int bank_bits, float zero, Bytes codes, Bytes tables,
                                    Some ids, MaybeFloats powers, Some scales, Some zeros, Floats row_scales, int act) {
    const Weights weights = lookup_weights(l, source, wide, mirrored, record_bytes, records_per_tile,
                                           bank_bits, zero, codes, tables, ids, powers, scales, zeros,
                                           row_scales, act);
    require(act != static_cast<int>(Act::float32) && has_gemm(weights), "many tokens need tables of bytes");
    return std::make_unique<PanelLinear>(PanelLinear{weights});
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

// A model while it is put together.
struct Builder {
    Shape shape;
    std::vector<Block> blocks;

    Builder(int64_t hidden, int64_t heads, int64_t kv_heads, int64_t dim, float eps, float scaling)
        : shape{hidden, heads, kv_heads, dim, eps, scaling} {
        const auto sound = [](int64_t size) { return 0 < size && size < int64_t{1} << 24; };
        require(sound(hidden) && sound(heads) && sound(kv_heads) && sound(dim) && sound(heads * dim) &&
                    heads % kv_heads == 0 && dim % 2 == 0,
                "the shape is no model's");
    }

    void block(Floats norm_in, Floats norm_out, const std::vector<const Linear*>& linears,
               const std::vector<MaybeFloats>& biases, MaybeFloats q_norm, MaybeFloats k_norm) {
        require(linears.size() == 7 && biases.size() == 7, "a block has seven layers");
        require(static_cast<int64_t>(norm_in.size()) == shape.hidden && norm_out.size() == norm_in.size(),
                "a norm has another size");
        Projection all[7];
        for (int i = 0; i < 7; ++i) {
            require(linears[i], "a layer is missing");
            all[i] = {linears[i], numbers(biases[i], linears[i]->rows, "a bias has another size")};
        }
        blocks.push_back({norm_in.data(), norm_out.data(), all[0], all[1], all[2], all[3], all[4], all[5],
                          all[6], numbers(q_norm, shape.dim, "a norm has another size"),
                          numbers(k_norm, shape.dim, "a norm has another size")});
    }

    std::unique_ptr<Model> build(Floats norm, const Linear& head, MaybeFloats bias) {
        require(static_cast<int64_t>(norm.size()) == shape.hidden, "a norm has another size");
        const Projection last{&head, numbers(bias, head.rows, "a bias has another size")};
        return std::make_unique<Model>(shape, blocks, norm.data(), last);
    }
};

std::vector<float> row_of(const Linear& table, int64_t row) {
    require(0 <= row && row < table.rows, "a row is out of range");
    std::vector<float> out(table.columns);
    if (!table.row(row, out.data())) out.clear();
    return out;
}

// The token's embedding is given, or a row of a table.
void advance(Model& model, const MaybeFloats& embedding, const Linear* table, int64_t token, const Floats& cos, const Floats& sin,
             Past past, const Packed* packed, Array<float, 1>& logits, int threads) {
    const Shape& s = model.shape;
    const auto is = [&](size_t found, int64_t expected) { return static_cast<int64_t>(found) == expected; };
    std::vector<float> row;
    if (table) {
        require(table->columns == s.hidden, "the table has another width");
        row = row_of(*table, token);
    }
    const float* first = embedding ? embedding->data() : row.data();
    require(is(embedding ? embedding->size() : row.size(), s.hidden) && is(cos.size(), s.dim) &&
                is(sin.size(), s.dim) && is(logits.size(), model.tokens()),
            "an array has another size");
    const Position at{cos.data(), sin.data(), past, packed};
    nb::gil_scoped_release free;
    model.advance(first, at, logits.data(), threads);
}

void advance_floats(Model& model, MaybeFloats embedding, const Linear* table, int64_t token, Floats cos, Floats sin,
                    Array<float, 5> past, int64_t length, Array<float, 1> logits, int threads) {
    const Shape& s = model.shape;
    const auto is = [&](size_t found, int64_t expected) { return static_cast<int64_t>(found) == expected; };
    require(is(past.shape(0), model.depth()) && past.shape(1) == 2 && is(past.shape(2), s.kv_heads) &&
                is(past.shape(4), s.dim) && 0 <= length && length < static_cast<int64_t>(past.shape(3)),
            "the past has another shape, or no room");
    const Past floats{past.data(), static_cast<int64_t>(past.shape(3)), length};
    advance(model, embedding, table, token, cos, sin, floats, nullptr, logits, threads);
}

void advance_packed(Model& model, MaybeFloats embedding, const Linear* table, int64_t token, Floats cos, Floats sin,
                    const std::vector<const KvBlock*>& past, int64_t packed, int64_t sinks, int64_t waiting,
                    Array<float, 1> logits, int threads) {
    require(static_cast<int64_t>(past.size()) == model.depth(), "there is a past of each block");
    std::vector<Packed> blocks;
    blocks.reserve(past.size());
    for (const KvBlock* block : past) {
        require(block, "a block is missing");
        blocks.push_back(block->packed(model.shape, packed, sinks, waiting));
    }
    advance(model, embedding, table, token, cos, sin, {nullptr, 0, 0}, blocks.data(), logits, threads);
}

}  // namespace

void bind_step(nb::module_& m) {
    nb::class_<Linear>(m, "Linear").def("row", row_of, "row"_a);
    nb::class_<LookupLinear, Linear>(m, "LookupLinear")
        .def("product", product, "x"_as_is, "y"_as_is, "threads"_a);
    nb::class_<PanelLinear>(m, "PanelLinear")
        .def("product", &PanelLinear::product, "x"_as_is, "y"_as_is, "act"_a, "step"_a, "threads"_a)
        .def("product_of_codes", &PanelLinear::product_of_codes, "x"_as_is, "steps"_as_is, "y"_as_is, "step"_a, "threads"_a);
    def_of_weights(m, "lookup_linear", lookup);
    def_of_weights(m, "panel_linear", panels);
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
            for (int64_t i = 0; i < inner.columns; ++i)
                require(0 <= order.data()[i] && order.data()[i] < inner.columns, "an order is out of range");
            return made<PermutedLinear>(inner, order.data());
        },
        "inner"_a, "order"_as_is, nb::keep_alive<0, 1>(), nb::keep_alive<0, 2>());
    nb::class_<Builder>(m, "ModelBuilder")
        .def(nb::init<int64_t, int64_t, int64_t, int64_t, float, float>(), "hidden"_a, "heads"_a,
             "kv_heads"_a, "dim"_a, "eps"_a, "scaling"_a)
        .def("block", &Builder::block, "norm_in"_as_is, "norm_out"_as_is, "linears"_a, "biases"_as_is,
             "q_norm"_as_is.none(), "k_norm"_as_is.none(), nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(),
             nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>(), nb::keep_alive<1, 7>())
        .def("build", &Builder::build, "norm"_as_is, "head"_a, "bias"_as_is.none(), nb::keep_alive<0, 1>(),
             nb::keep_alive<0, 2>(), nb::keep_alive<0, 3>(), nb::keep_alive<0, 4>());
    nb::class_<Model>(m, "Model")
        .def("advance", advance_floats, "embedding"_as_is.none(), "table"_a.none(), "token"_a, "cos"_as_is,
             "sin"_as_is, "past"_as_is, "length"_a, "logits"_as_is, "threads"_a)
        .def("advance", advance_packed, "embedding"_as_is.none(), "table"_a.none(), "token"_a, "cos"_as_is,
             "sin"_as_is, "past"_a, "packed"_a, "sinks"_a, "waiting"_a, "logits"_as_is, "threads"_a);
}

}  // namespace bitmill
