// The Python module: arrays of any library by DLPack, no library's headers.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "arrays.h"
#include "fixed/fixed.h"
#include "isa.h"
#include "lut/linear.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace bitmill;

namespace {

void init_layout(Layout* self, int64_t rows, int64_t columns, int64_t group, int bits, int rows_per_tile,
                 int group_blocks) {
    const Layout layout{rows, columns, group, bits, rows_per_tile, group_blocks};
    check(layout);
    new (self) Layout(layout);
}

void to_layout_of(const Layout& l, Array<const int32_t, 2> words, Array<uint8_t, 1> out, int threads) {
    check(l, out.size());
    require(words.shape(0) == static_cast<size_t>(l.rows) &&
                words.shape(1) * 32 >= static_cast<size_t>(l.columns * l.bits),
            "words are not of the layout's shape");
    nb::gil_scoped_release free;
    to_layout(l, reinterpret_cast<const uint32_t*>(words.data()), words.shape(1), out.data(), threads);
}

void from_layout_of(const Layout& l, Bytes stored, Array<int32_t, 2> words, int threads) {
    check(l, stored.size());
    require(words.shape(0) == static_cast<size_t>(l.rows) &&
                words.shape(1) * 32 >= static_cast<size_t>(l.columns * l.bits),
            "words are not of the layout's shape");
    nb::gil_scoped_release free;
    from_layout(l, stored.data(), reinterpret_cast<uint32_t*>(words.data()), words.shape(1), threads);
}

void unpack_rows_of(const Layout& l, Bytes stored, int64_t first, Array<uint8_t, 2> out, int threads) {
    check(l, stored.size());
    const int64_t count = out.shape(0);
    require(inside(first, count, l.rows) && out.shape(1) == static_cast<size_t>(l.columns),
            "the rows are not the layout's");
    nb::gil_scoped_release free;
    unpack_rows(l, stored.data(), first, count, out.data(), threads);
}

void gather_rows_of(const Layout& l, Bytes stored, Array<const int64_t, 1> rows, Array<uint8_t, 2> out,
                   int threads) {
    check(l, stored.size());
    require(out.shape(0) == rows.shape(0) && out.shape(1) == static_cast<size_t>(l.columns),
            "out has another shape");
    for (size_t i = 0; i < rows.size(); ++i)
        if (rows.data()[i] < 0 || rows.data()[i] >= l.rows) throw std::out_of_range("a row is out of range");
    nb::gil_scoped_release free;
    gather_rows(l, stored.data(), rows.data(), rows.size(), out.data(), threads);
}

void bytes_to_layout_of(const Layout& l, Array<const uint8_t, 2> codes, Array<uint8_t, 1> out, int threads) {
    check(l, out.size());
    require(codes.shape(0) == static_cast<size_t>(l.rows) && codes.shape(1) == static_cast<size_t>(l.columns),
            "codes have another shape");
    nb::gil_scoped_release free;
    bytes_to_layout(l, codes.data(), out.data(), threads);
}

void decode_of(const Layout& l, Bytes codes, Array<const float, 1> tables,
               std::optional<Array<const int32_t, 2>> ids, Array<const float, 2> scales,
               Array<const float, 2> zeros, int64_t first, Array<float, 2> out, int threads) {
    require(inside(first, out.shape(0), l.rows) && out.shape(1) == static_cast<size_t>(l.columns),
            "the rows are not the layout's");
    const Levels some = levels(l, codes, tables, ids, scales, zeros, first, out.shape(0));
    nb::gil_scoped_release free;
    decode_levels(some, out.shape(0), out.data(), threads);
}

void linear_of(const Layout& l, int source, bool wide, bool mirrored, int64_t record_bytes,
               int64_t records_per_tile, int bank_bits, float zero, Bytes codes, Bytes tables, Some ids,
               std::optional<Array<const float, 1>> powers, Some scales, Some zeros,
               Array<const float, 1> row_scales, int act, Array<const float, 2> x, Array<float, 2> y,
               int threads) {
    const Weights w = lookup_weights(l, source, wide, mirrored, record_bytes, records_per_tile, bank_bits,
                                     zero, codes, tables, ids, powers, scales, zeros, row_scales, act);
    require(x.shape(1) == static_cast<size_t>(l.columns) && y.shape(1) == static_cast<size_t>(l.rows) &&
                x.shape(0) == y.shape(0), "x or y has another shape");
    nb::gil_scoped_release free;
    linear(w, x.data(), x.shape(0), static_cast<Act>(act), y.data(), threads);
}

void additive_of(const Layout& l, Bytes codes, Array<const float, 3> books, Bytes scales,
                 Array<const float, 2> x, Array<float, 2> y, int threads) {
    const int64_t columns = x.shape(1);
    const Additive w = additive_weights(l, codes, books, scales, columns);
    require(y.shape(1) == static_cast<size_t>(l.rows) && x.shape(0) == y.shape(0), "y has another shape");
    nb::gil_scoped_release free;
    additive(w, x.data(), columns, x.shape(0), y.data(), threads);
}

void vector_linear_of(int set, int64_t group, int bits, Array<const int32_t, 2> words,
                      Array<const float, 2> scales, Array<const float, 1> table, Array<const float, 2> x,
                      Array<float, 2> y, int threads) {
    const Vectors w = vectors(set, x.shape(1), group, bits, words, scales, table);
    require(y.shape(0) == x.shape(0) && static_cast<int64_t>(y.shape(1)) == w.rows, "y has another shape");
    nb::gil_scoped_release free;
    vector_linear(w, x.data(), x.shape(0), y.data(), threads);
}

void vector_decode_of(int set, int64_t group, int bits, Array<const int32_t, 2> words,
                      Array<const float, 2> scales, Array<const float, 1> table, int64_t first,
                      Array<float, 2> out, int threads) {
    const Vectors w = vectors(set, out.shape(1), group, bits, words, scales, table);
    require(inside(first, out.shape(0), w.rows), "the rows are not the matrix's");
    nb::gil_scoped_release free;
    vector_decode(w, first, out.shape(0), out.data(), threads);
}

void coordinates_of(int bits, int64_t columns, Array<const int32_t, 2> words, Array<int8_t, 2> y,
                    Array<uint8_t, 2> gains, int threads) {
    require(0 < columns && columns < int64_t{1} << 31, "the columns are out of range");
    const int64_t points = (columns + 15) / 16, rows = words.shape(0);
    require(1 <= bits && bits <= 4 &&
                static_cast<int64_t>(words.shape(1)) * 32 >= points * (16 * bits + 4) &&
                static_cast<int64_t>(y.shape(0)) == rows && static_cast<int64_t>(y.shape(1)) == 16 * points &&
                static_cast<int64_t>(gains.shape(0)) == rows &&
                static_cast<int64_t>(gains.shape(1)) == points,
            "the arrays are not of one matrix");
    const Vectors w{VectorSet::pyramid, rows, columns, columns, reinterpret_cast<const uint32_t*>(words.data()),
                    static_cast<int64_t>(words.shape(1)), nullptr, 1, false, bits, nullptr};
    nb::gil_scoped_release free;
    coordinates(w, y.data(), gains.data(), threads);
}

void trellis_codes_of(int bits, Array<const int16_t, 1> levels, Array<const int16_t, 2> x, Array<uint8_t, 2> codes,
                      int kept, int threads) {
    const int state_bits = state_bits_of(levels.size());
    require(1 <= bits && bits <= 4 && x.shape(1) == trellis_block && codes.shape(0) == x.shape(0) &&
                codes.shape(1) == static_cast<size_t>(trellis_block / 8 * bits),
            "the arrays are not of one set of blocks");
    require(kept == 0 || kept == 16 || kept == 32 || kept == 48, "kept numbers are whole quarters of a block");
    for (size_t i = 0; i < levels.size(); ++i) require(-510 <= levels.data()[i] && levels.data()[i] <= 510, "a level is out of range");
    for (size_t i = 0; i < x.size(); ++i) require(-510 <= x.data()[i] && x.data()[i] <= 510, "a number is out of range");
    nb::gil_scoped_release free;
    trellis_codes({bits, state_bits, levels.data()}, x.shape(0), x.data(), kept, codes.data(), threads);
}

void nearest_points_of(int bits, Array<const float, 1> lengths, Array<const float, 2> x, Array<uint8_t, 2> codes,
                       Array<float, 2> vectors, int threads) {
    require(1 <= bits && bits <= 4 && lengths.shape(0) == 16 && x.shape(1) == 16 && vectors.shape(1) == 16 &&
                vectors.shape(0) == x.shape(0) && codes.shape(0) == x.shape(0) &&
                static_cast<int>(codes.shape(1)) == 4 * bits + 1,
            "the arrays are not of the same points");
    nb::gil_scoped_release free;
    nearest_points(bits, lengths.data(), x.shape(0), x.data(), codes.data(), vectors.data(), threads);
}

void numbers_of(int bits, Array<const int8_t, 2> y, Array<const uint8_t, 2> gains, Array<int32_t, 2> words,
                int threads) {
    const int64_t rows = y.shape(0), points = gains.shape(1);
    require(1 <= bits && bits <= 4 && static_cast<int64_t>(y.shape(1)) == 16 * points &&
                static_cast<int64_t>(gains.shape(0)) == rows && static_cast<int64_t>(words.shape(0)) == rows &&
                static_cast<int64_t>(words.shape(1)) == (points * (16 * bits + 4) + 31) / 32,
            "the arrays are not of one matrix");
    require(are_points(bits, rows * points, y.data(), gains.data()), "there are no such points");
    nb::gil_scoped_release free;
    numbers(bits, rows, points, y.data(), gains.data(), reinterpret_cast<uint32_t*>(words.data()),
            words.shape(1), threads);
}

void points_linear_of(const Layout& l, Bytes codes, Bytes gains, Array<const float, 1> lengths,
                      Array<const float, 1> scales, Array<const int32_t, 1> starts,
                      Array<const int32_t, 1> places, Array<const int8_t, 2> odd, int act,
                      Array<const float, 2> x, Array<float, 2> y, int threads) {
    const Points w = points(l, codes, gains, lengths, scales, starts, places, odd, x.shape(1));
    require(0 <= act && act <= 1 && y.shape(0) == x.shape(0) && y.shape(1) == static_cast<size_t>(l.rows),
            "y has another shape");
    nb::gil_scoped_release free;
    points_linear(w, x.data(), x.shape(1), x.shape(0), static_cast<Act>(act), y.data(), threads);
}

void points_decode_of(const Layout& l, Bytes codes, Bytes gains, Array<const float, 1> lengths,
                      Array<const float, 1> scales, Array<const int32_t, 1> starts,
                      Array<const int32_t, 1> places, Array<const int8_t, 2> odd, int64_t first,
                      Array<float, 2> out, int threads) {
    const Points w = points(l, codes, gains, lengths, scales, starts, places, odd, out.shape(1));
    require(inside(first, out.shape(0), l.rows), "the rows are not the matrix's");
    nb::gil_scoped_release free;
    points_decode(w, out.shape(1), first, out.shape(0), out.data(), threads);
}

void lattice_linear_of(const Layout& l, Bytes codes, Bytes sizes, Array<const float, 1> scales, int act,
                       Array<const float, 2> x, Array<float, 2> y, int threads) {
    const Lattice w = lattice(l, codes, sizes, scales, x.shape(1));
    require(0 <= act && act <= 1 && y.shape(0) == x.shape(0) && y.shape(1) == static_cast<size_t>(l.rows),
            "y has another shape");
    nb::gil_scoped_release free;
    lattice_linear(w, x.data(), x.shape(1), x.shape(0), static_cast<Act>(act), y.data(), threads);
}

void lattice_decode_of(const Layout& l, Bytes codes, Bytes sizes, Array<const float, 1> scales, int64_t first,
                       Array<float, 2> out, int threads) {
    const Lattice w = lattice(l, codes, sizes, scales, out.shape(1));
    require(inside(first, out.shape(0), l.rows), "the rows are not the matrix's");
    nb::gil_scoped_release free;
    lattice_decode(w, out.shape(1), first, out.shape(0), out.data(), threads);
}

void rotate_of(Array<const int64_t, 2> steps, Array<const float, 1> numbers, Array<const int32_t, 1> orders,
               Array<float, 2> x, int threads) {
    const Rotation turns = rotation(steps, numbers, orders, x.shape(1));
    nb::gil_scoped_release free;
    rotate(turns, x.data(), x.shape(0), threads);
}

void sparse_add_of(Array<const int64_t, 1> starts, Bytes places, Array<const uint8_t, 1> values,
                   Array<const float, 2> x, Array<float, 2> y, int threads) {
    const Sparse s = sparse(starts, places, values, y.shape(1), x.shape(1));
    require(x.shape(0) == y.shape(0), "x or y has another shape");
    nb::gil_scoped_release free;
    sparse_add(s, x.data(), x.shape(0), y.data(), threads);
}

void read_inputs_of(FixedInputs& self, Array<const float, 2> x, int threads) {
    require(x.shape(1) > 0, "x has no columns");
    nb::gil_scoped_release free;
    fixed_inputs(fixed_shape(x.shape(1)), {x.data(), nullptr, nullptr, 0}, x.shape(0), self, threads);
}

// The outputs from column `first` on.
void fixed_product_of(const FixedInputs& x, Array<const float, 2> W, Array<float, 2> y, int64_t first, int threads) {
    const int64_t rows = W.shape(0), stride = y.shape(1);
    require(x.shape.columns > 0, "no inputs were read");
    require(static_cast<int64_t>(W.shape(1)) == x.shape.columns && static_cast<int64_t>(y.shape(0)) == x.tokens &&
                inside(first, rows, stride),
            "W or y has another shape");
    nb::gil_scoped_release free;
    fixed_product(x, W.data(), rows, y.data() + first, stride, threads);
}

}  // namespace

NB_MODULE(_native, m) {
    nb::class_<Layout>(m, "Layout")
        .def("__init__", init_layout, "rows"_a, "columns"_a, "group"_a, "bits"_a, "rows_per_tile"_a,
             "group_blocks"_a)
        .def_prop_ro("tiles", &Layout::tiles)
        .def_prop_ro("padded_groups", &Layout::padded_groups)
        .def_prop_ro("code_bytes", [](const Layout& l) { return l.tiles() * l.tile_bytes(); });
    m.def("to_layout", to_layout_of, "layout"_a, "words"_as_is, "out"_as_is, "threads"_a);
    m.def("from_layout", from_layout_of, "layout"_a, "stored"_as_is, "words"_as_is, "threads"_a);
    m.def("codes_of", unpack_rows_of, "layout"_a, "stored"_as_is, "first"_a, "out"_as_is, "threads"_a);
    m.def("bytes_to_layout", bytes_to_layout_of, "layout"_a, "codes"_as_is, "out"_as_is, "threads"_a);
    m.def("decode", decode_of, "layout"_a, "codes"_as_is, "tables"_as_is, "ids"_as_is.none(), "scales"_as_is,
          "zeros"_as_is, "first"_a, "out"_as_is, "threads"_a);
    m.def("codes_at", gather_rows_of, "layout"_a, "stored"_as_is, "rows"_a, "out"_as_is, "threads"_a);
    m.def("linear", linear_of, "layout"_a, "source"_a, "wide"_a, "mirrored"_a, "record_bytes"_a,
          "records_per_tile"_a, "bank_bits"_a, "zero"_a, "codes"_as_is, "tables"_as_is, "ids"_as_is.none(),
          "powers"_as_is.none(), "scales"_as_is.none(), "zeros"_as_is.none(), "row_scales"_as_is, "act"_a,
          "x"_as_is, "y"_as_is, "threads"_a);
    m.def("additive", additive_of, "layout"_a, "codes"_as_is, "books"_as_is, "scales"_as_is, "x"_as_is,
          "y"_as_is, "threads"_a);
    m.def("vector_linear", vector_linear_of, "set"_a, "group"_a, "bits"_a, "words"_as_is, "scales"_as_is,
          "table"_as_is, "x"_as_is, "y"_as_is, "threads"_a);
    m.def("vector_decode", vector_decode_of, "set"_a, "group"_a, "bits"_a, "words"_as_is, "scales"_as_is,
          "table"_as_is, "first"_a, "out"_as_is, "threads"_a);
    m.def("coordinates", coordinates_of, "bits"_a, "columns"_a, "words"_as_is, "y"_as_is, "gains"_as_is,
          "threads"_a);
    m.def("trellis_codes", trellis_codes_of, "bits"_a, "levels"_as_is, "x"_as_is, "codes"_as_is, "kept"_a,
          "threads"_a);
    m.def("nearest_points", nearest_points_of, "bits"_a, "lengths"_as_is, "x"_as_is, "codes"_as_is,
          "vectors"_as_is, "threads"_a);
    m.def("numbers", numbers_of, "bits"_a, "y"_as_is, "gains"_as_is, "words"_as_is, "threads"_a);
    m.def("points_linear", points_linear_of, "layout"_a, "codes"_as_is, "gains"_as_is, "lengths"_as_is,
          "scales"_as_is, "starts"_as_is, "places"_as_is, "odd"_as_is, "act"_a, "x"_as_is, "y"_as_is,
          "threads"_a);
    m.def("points_decode", points_decode_of, "layout"_a, "codes"_as_is, "gains"_as_is, "lengths"_as_is,
          "scales"_as_is, "starts"_as_is, "places"_as_is, "odd"_as_is, "first"_a, "out"_as_is, "threads"_a);
    m.def("lattice_linear", lattice_linear_of, "layout"_a, "codes"_as_is, "sizes"_as_is, "scales"_as_is,
          "act"_a, "x"_as_is, "y"_as_is, "threads"_a);
    m.def("lattice_decode", lattice_decode_of, "layout"_a, "codes"_as_is, "sizes"_as_is, "scales"_as_is,
          "first"_a, "out"_as_is, "threads"_a);
    m.def("rotate", rotate_of, "steps"_as_is, "numbers"_as_is, "orders"_as_is, "x"_as_is, "threads"_a);
    m.def("sparse_add", sparse_add_of, "starts"_as_is, "places"_as_is, "values"_as_is, "x"_as_is, "y"_as_is,
          "threads"_a);
    nb::class_<FixedInputs>(m, "FixedInputs")
        .def(nb::init<>())
        .def("read", read_inputs_of, "x"_as_is, "threads"_a)
        .def("product", fixed_product_of, "W"_as_is, "y"_as_is, "first"_a, "threads"_a);
    bind_step(m);
    bind_kv(m);
    bind_solve(m);
    m.def("read_all", [](Bytes bytes, int threads) {
        nb::gil_scoped_release free;
        return read_all(bytes.data(), bytes.size(), threads);
    });
    m.def("int8_peak", [](int64_t rounds, int threads) {
        nb::gil_scoped_release free;
        return fixed_peak(rounds, threads);
    });
    m.def("isas", available_isas);
    m.def("isa", [] { return std::string(isa().name); });
    m.def("use_isa", use_isa);
}
