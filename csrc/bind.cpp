// The Python module: arrays of any library by DLPack, no library's headers.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "arrays.h"
#include "isa.h"
#include "lut/linear.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace bitmill;

namespace {

void to_layout_of(const Layout& l, Array<const int32_t, 2> words, Array<uint8_t, 1> out, int threads) {
    check(l, out.size());
    require(words.shape(0) == static_cast<size_t>(l.rows) && words.shape(1) * 32 >= static_cast<size_t>(l.columns * l.bits),
            "words are not of the layout's shape");
    nb::gil_scoped_release free;
    to_layout(l, reinterpret_cast<const uint32_t*>(words.data()), words.shape(1), out.data(), threads);
}

void from_layout_of(const Layout& l, Bytes stored, Array<int32_t, 2> words, int threads) {
    check(l, stored.size());
    require(words.shape(0) == static_cast<size_t>(l.rows) && words.shape(1) * 32 >= static_cast<size_t>(l.columns * l.bits),
            "words are not of the layout's shape");
    nb::gil_scoped_release free;
    from_layout(l, stored.data(), reinterpret_cast<uint32_t*>(words.data()), words.shape(1), threads);
}

void codes_of_rows(const Layout& l, Bytes stored, int64_t first, Array<uint8_t, 2> out, int threads) {
    check(l, stored.size());
    const int64_t count = out.shape(0);
    require(0 <= first && first + count <= l.rows && out.shape(1) == static_cast<size_t>(l.columns),
            "the rows are not the layout's");
    nb::gil_scoped_release free;
    codes_of(l, stored.data(), first, count, out.data(), threads);
}

void codes_at_rows(const Layout& l, Bytes stored, Array<const int64_t, 1> rows, Array<uint8_t, 2> out, int threads) {
    check(l, stored.size());
    require(out.shape(0) == rows.shape(0) && out.shape(1) == static_cast<size_t>(l.columns), "out has another shape");
    for (size_t i = 0; i < rows.size(); ++i)
        if (rows.data()[i] < 0 || rows.data()[i] >= l.rows) throw std::out_of_range("a row is out of range");
    nb::gil_scoped_release free;
    codes_at(l, stored.data(), rows.data(), rows.size(), out.data(), threads);
}

void linear_of(const Layout& l, int source, bool wide, bool mirrored, int64_t record_bytes, int64_t records_per_tile, int bank_bits,
               float zero, Bytes codes, Bytes tables, Some ids, std::optional<Array<const float, 1>> powers, Some scales, Some zeros,
               Array<const float, 1> row_scales, int act, Array<const float, 2> x, Array<float, 2> y, int threads) {
    const Weights w = lookup_weights(l, source, wide, mirrored, record_bytes, records_per_tile, bank_bits, zero, codes, tables, ids,
                                     powers, scales, zeros, row_scales, act);
    require(x.shape(1) == static_cast<size_t>(l.columns) && y.shape(1) == static_cast<size_t>(l.rows) &&
                x.shape(0) == y.shape(0), "x or y has another shape");
    nb::gil_scoped_release free;
    linear(w, x.data(), x.shape(0), static_cast<Act>(act), y.data(), threads);
}

void additive_of(const Layout& l, Bytes codes, Array<const float, 3> books, Bytes scales, Array<const float, 2> x,
                 Array<float, 2> y, int threads) {
    const int64_t columns = x.shape(1);
    const Additive w = additive_weights(l, codes, books, scales, columns);
    require(y.shape(1) == static_cast<size_t>(l.rows) && x.shape(0) == y.shape(0), "y has another shape");
    nb::gil_scoped_release free;
    additive(w, x.data(), columns, x.shape(0), y.data(), threads);
}

void vector_linear_of(int set, int64_t group, int bits, Array<const int32_t, 2> words, Array<const float, 2> scales,
                      Array<const float, 1> table, Array<const float, 2> x, Array<float, 2> y, int threads) {
    const Vectors w = vectors(set, x.shape(1), group, bits, words, scales, table);
    require(y.shape(0) == x.shape(0) && static_cast<int64_t>(y.shape(1)) == w.rows, "y has another shape");
    nb::gil_scoped_release free;
    vector_linear(w, x.data(), x.shape(0), y.data(), threads);
}

void vector_decode_of(int set, int64_t group, int bits, Array<const int32_t, 2> words, Array<const float, 2> scales,
                      Array<const float, 1> table, int64_t first, Array<float, 2> out, int threads) {
    const Vectors w = vectors(set, out.shape(1), group, bits, words, scales, table);
    require(0 <= first && first + static_cast<int64_t>(out.shape(0)) <= w.rows, "the rows are not the matrix's");
    nb::gil_scoped_release free;
    vector_decode(w, first, out.shape(0), out.data(), threads);
}

void rotate_of(Array<const int64_t, 2> steps, Array<const float, 1> numbers, Array<const int32_t, 1> orders,
               Array<float, 2> x, int threads) {
    const Rotation turns = rotation(steps, numbers, orders, x.shape(1));
    nb::gil_scoped_release free;
    rotate(turns, x.data(), x.shape(0), threads);
}

void sparse_add_of(Array<const int64_t, 1> starts, Bytes places, Array<const uint8_t, 1> values, Array<const float, 2> x,
                   Array<float, 2> y, int threads) {
    const Sparse s = sparse(starts, places, values, y.shape(1), x.shape(1));
    require(x.shape(0) == y.shape(0), "x or y has another shape");
    nb::gil_scoped_release free;
    sparse_add(s, x.data(), x.shape(0), y.data(), threads);
}

}  // namespace

NB_MODULE(_native, m) {
    nb::class_<Layout>(m, "Layout")
        .def("__init__", [](Layout* self, int64_t rows, int64_t columns, int64_t group, int bits, int rows_per_tile,
                            int group_blocks) { new (self) Layout{rows, columns, group, bits, rows_per_tile, group_blocks}; },
             "rows"_a, "columns"_a, "group"_a, "bits"_a, "rows_per_tile"_a, "group_blocks"_a)
        .def_prop_ro("tiles", &Layout::tiles)
        .def_prop_ro("padded_groups", &Layout::padded_groups)
        .def_prop_ro("code_bytes", [](const Layout& l) { return l.tiles() * l.tile_bytes(); });
    m.def("to_layout", to_layout_of, "layout"_a, "words"_a, "out"_a, "threads"_a);
    m.def("from_layout", from_layout_of, "layout"_a, "stored"_a, "words"_a, "threads"_a);
    m.def("codes_of", codes_of_rows, "layout"_a, "stored"_a, "first"_a, "out"_a, "threads"_a);
    m.def("codes_at", codes_at_rows, "layout"_a, "stored"_a, "rows"_a, "out"_a, "threads"_a);
    m.def("linear", linear_of, "layout"_a, "source"_a, "wide"_a, "mirrored"_a, "record_bytes"_a, "records_per_tile"_a, "bank_bits"_a,
          "zero"_a, "codes"_a, "tables"_a, "ids"_a.none(), "powers"_a.none(), "scales"_a.none(), "zeros"_a.none(),
          "row_scales"_a, "act"_a, "x"_a, "y"_a, "threads"_a);
    m.def("additive", additive_of, "layout"_a, "codes"_a, "books"_a, "scales"_a, "x"_a, "y"_a, "threads"_a);
    m.def("vector_linear", vector_linear_of, "set"_a, "group"_a, "bits"_a, "words"_a, "scales"_a, "table"_a, "x"_a, "y"_a,
          "threads"_a);
    m.def("vector_decode", vector_decode_of, "set"_a, "group"_a, "bits"_a, "words"_a, "scales"_a, "table"_a, "first"_a,
          "out"_a, "threads"_a);
    m.def("rotate", rotate_of, "steps"_a, "numbers"_a, "orders"_a, "x"_a, "threads"_a);
    m.def("sparse_add", sparse_add_of, "starts"_a, "places"_a, "values"_a, "x"_a, "y"_a, "threads"_a);
    bind_step(m);
    m.def("read_all", [](Bytes bytes, int threads) {
        nb::gil_scoped_release free;
        return read_all(bytes.data(), bytes.size(), threads);
    });
    m.def("isas", available_isas);
    m.def("isa", [] { return std::string(isa().name); });
    m.def("use_isa", use_isa);
}
