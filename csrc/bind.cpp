// The Python module: arrays of any library by DLPack, no library's headers.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>

#include "additive/additive.h"
#include "isa.h"
#include "lut/floats.h"
#include "lut/linear.h"
#include "rotation/rotation.h"
#include "sparse/sparse.h"
#include "vector/vector.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace bitmill;

namespace {

template <class T, int dims>
using Array = nb::ndarray<T, nb::ndim<dims>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const uint8_t, nb::c_contig, nb::device::cpu>;

void require(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
}

// What the kernels must not meet: shapes of arrays that do not fit the layout.
void check(const Layout& l, size_t code_bytes) {
    require(l.rows > 0 && l.columns > 0 && l.group > 0 && 1 <= l.bits && l.bits <= 8, "a layout is out of range");
    const int R = l.rows_per_tile;
    require(R == 64 || R == 16 || R == 4 || R == 1, "rows_per_tile is 64, 16, 4 or 1");
    const int f = l.group_blocks;
    require(f > 0 && (f % 8 == 0 || f == 2 || f == 4), "group_blocks is 2, 4 or a multiple of 8");
    require(f * l.block_columns() >= std::min(l.group, l.columns), "group_blocks are fewer than a group needs");
    require(code_bytes == static_cast<size_t>(l.tiles() * l.tile_bytes()), "codes are not of the layout's size");
}

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

void bytes_to_layout_of(const Layout& l, Array<const uint8_t, 2> codes, Array<uint8_t, 1> out, int threads) {
    check(l, out.size());
    require(codes.shape(0) == static_cast<size_t>(l.rows) && codes.shape(1) == static_cast<size_t>(l.columns),
            "codes have another shape");
    nb::gil_scoped_release free;
    bytes_to_layout(l, codes.data(), out.data(), threads);
}

void decode_of(const Layout& l, Bytes codes, Array<const float, 1> tables, std::optional<Array<const int32_t, 2>> ids,
               Array<const float, 2> scales, Array<const float, 2> zeros, int64_t first, Array<float, 2> out, int threads) {
    check(l, codes.size());
    require(l.rows_per_tile <= 16, "a tile has up to 16 rows");
    const auto fits = [&](size_t rows, size_t groups) {
        return (rows == 1 || rows == out.shape(0)) && (groups == 1 || groups == static_cast<size_t>(l.groups()));
    };
    require(fits(scales.shape(0), scales.shape(1)) && fits(zeros.shape(0), zeros.shape(1)) &&
                (!ids || fits(ids->shape(0), ids->shape(1))), "numbers are of other groups");
    const int64_t one = int64_t{1} << l.bits, count = (static_cast<int64_t>(tables.size()) - 64) / one;
    require(count > 0, "the tables are too small");
    for (size_t i = 0; ids && i < ids->size(); ++i) require(0 <= ids->data()[i] && ids->data()[i] < count, "there is no such table");
    require(0 <= first && first + static_cast<int64_t>(out.shape(0)) <= l.rows && out.shape(1) == static_cast<size_t>(l.columns),
            "the rows are not the layout's");
    const auto size = [](const auto& a, int i) { return static_cast<int64_t>(a.shape(i)); };
    const Levels levels{l, codes.data(), first, tables.data(), ids ? ids->data() : nullptr, scales.data(), zeros.data(),
                        ids ? size(*ids, 0) : 1, ids ? size(*ids, 1) : 1, size(scales, 0), size(scales, 1),
                        size(zeros, 0), size(zeros, 1)};
    nb::gil_scoped_release free;
    decode_levels(levels, out.shape(0), out.data(), threads);
}

void linear_of(const Layout& l, int source, bool wide, bool mirrored, int64_t record_bytes, int64_t records_per_tile, int bank_bits,
               float zero, Bytes codes, Bytes tables, std::optional<Bytes> ids, std::optional<Array<const float, 1>> powers,
               std::optional<Bytes> scales, std::optional<Bytes> zeros, Array<const float, 1> row_scales, int act,
               Array<const float, 2> x, Array<float, 2> y, int threads) {
    check(l, codes.size());
    const size_t places = l.tiles() * l.padded_groups() * l.rows_per_tile;
    const bool halves = zeros && zeros->size() == 2 * places;
    const Source kind = static_cast<Source>(source);
    require(0 <= source && source <= 2 && 0 <= act && act <= 2, "an enumeration is out of range");
    require(0 < bank_bits + 1 && bank_bits <= 5, "a bank has up to 32 tables");
    const bool floats = act == static_cast<int>(Act::float32), bank = kind == Source::bank;
    const bool lanes = l.rows_per_tile > 1 && kind == Source::own;
    require(!mirrored || (lanes && (l.bits == 3 || l.bits == 4)), "only rows' own tables of 3 or 4 bits are mirrored");
    if (bank) {
        const size_t least = floats ? size_t{4} << (bank_bits + l.bits) : l.bits == 4 ? 512 : l.bits == 3 ? 256 : 128;
        require(ids && ids->size() == places && powers && powers->size() == 16, "a bank needs ids and 16 powers");
        require(tables.size() >= least, "the bank is too small");
    } else {
        const int64_t one = lanes ? (l.bits == 3 ? 128 : 64) / (mirrored ? 2 : 1) : l.bits <= 6 ? 64 : l.bits == 7 ? 128 : 256;
        require(record_bytes == (floats ? 4 * float_record(l.bits, l.rows_per_tile, kind) : one * (wide ? 2 : 1)),
                "records have another size");
        require(records_per_tile == 0 || records_per_tile == 1 || records_per_tile == l.padded_groups(),
                "records_per_tile is 0, 1 or the number of groups");
        require((kind == Source::shared) == (records_per_tile == 0), "shared tables, and they alone, are one record");
        const int64_t records = records_per_tile ? l.tiles() * records_per_tile : 1;
        require(tables.size() == static_cast<size_t>(records * record_bytes), "tables are not of the layout's size");
    }
    const bool wide_scales = scales && scales->size() == 4 * places;
    require(!scales || wide_scales || scales->size() == 2 * places, "scales are not of the layout's size");
    require(!zeros || halves || zeros->size() == places, "zeros are not of the layout's size");
    require(row_scales.size() == static_cast<size_t>(l.tiles() * l.rows_per_tile), "row scales have another size");
    require(x.shape(1) == static_cast<size_t>(l.columns) && y.shape(1) == static_cast<size_t>(l.rows) &&
                x.shape(0) == y.shape(0), "x or y has another shape");
    Weights w{l, kind, wide, codes.data(), tables.data(), mirrored, record_bytes, records_per_tile,
              ids ? ids->data() : nullptr, bank_bits, powers ? powers->data() : nullptr,
              scales ? static_cast<const void*>(scales->data()) : nullptr, wide_scales,
              !zeros ? Zero::constant : halves ? Zero::halves : Zero::bytes, zero,
              zeros ? static_cast<const void*>(zeros->data()) : nullptr, row_scales.data()};
    nb::gil_scoped_release free;
    linear(w, x.data(), x.shape(0), static_cast<Act>(act), y.data(), threads);
}

void additive_of(const Layout& l, Bytes codes, Array<const float, 3> books, Bytes scales, Array<const float, 2> x,
                 Array<float, 2> y, int threads) {
    check(l, codes.size());
    Additive w{l, static_cast<int>(books.shape(1)), static_cast<int>(books.shape(0)), codes.data(), books.data(),
               reinterpret_cast<const uint16_t*>(scales.data())};
    require(l.rows_per_tile == Additive::rows && l.group_blocks % 8 == 0, "the layout has tiles of 64 rows and whole chunks");
    require(w.codebooks > 0 && w.width > 0 && l.columns % w.codebooks == 0 && l.group % w.codebooks == 0,
            "blocks have a code of every codebook");
    require(books.shape(2) == static_cast<size_t>(w.entries()), "codebooks are repeated to 64 or 256 entries");
    require(scales.size() == static_cast<size_t>(2 * l.tiles() * l.groups() * Additive::rows), "scales have another size");
    const int64_t columns = x.shape(1);
    require(columns <= l.columns / w.codebooks * w.width && columns > (l.columns / w.codebooks - 1) * w.width &&
                y.shape(1) == static_cast<size_t>(l.rows) && x.shape(0) == y.shape(0), "x or y has another shape");
    nb::gil_scoped_release free;
    additive(w, x.data(), columns, x.shape(0), y.data(), threads);
}

Vectors vectors(int set, int64_t columns, int64_t group, int bits, const Array<const int32_t, 2>& words,
                const Array<const float, 2>& scales, const Array<const float, 1>& table) {
    const bool e8 = set == 0;
    require(0 <= set && set <= 1 && 1 <= bits && bits <= 4 && columns > 0 && group > 0, "a vector format is out of range");
    const int64_t width = e8 ? 8 : 16, blocks = (columns + width - 1) / width, rows = words.shape(0);
    require(static_cast<int64_t>(words.shape(1)) * 32 >= blocks * (e8 ? 16 : 16 * bits + 4), "words are too few");
    require(group % width == 0 && static_cast<int64_t>(scales.shape(1)) * group >= blocks * width, "scales are too few");
    require(scales.shape(0) == 1 || static_cast<int64_t>(scales.shape(0)) == rows, "scales are of other rows");
    require(table.size() == (e8 ? 2048u : 16u), "the table has another size");
    return {static_cast<VectorSet>(set), rows, columns, group, reinterpret_cast<const uint32_t*>(words.data()),
            static_cast<int64_t>(words.shape(1)), scales.data(), static_cast<int64_t>(scales.shape(1)),
            scales.shape(0) > 1, bits, table.data()};
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

void coordinates_of(int bits, int64_t columns, Array<const int32_t, 2> words, Array<int8_t, 2> y, Array<uint8_t, 2> gains,
                    int threads) {
    const int64_t points = (columns + 15) / 16, rows = words.shape(0);
    require(1 <= bits && bits <= 4 && columns > 0 && static_cast<int64_t>(words.shape(1)) * 32 >= points * (16 * bits + 4) &&
                static_cast<int64_t>(y.shape(0)) == rows && static_cast<int64_t>(y.shape(1)) == 16 * points &&
                static_cast<int64_t>(gains.shape(0)) == rows && static_cast<int64_t>(gains.shape(1)) == points,
            "the arrays are not of one matrix");
    const Vectors w{VectorSet::pyramid, rows, columns, columns, reinterpret_cast<const uint32_t*>(words.data()),
                    static_cast<int64_t>(words.shape(1)), nullptr, 1, false, bits, nullptr};
    nb::gil_scoped_release free;
    coordinates(w, y.data(), gains.data(), threads);
}

void numbers_of(int bits, Array<const int8_t, 2> y, Array<const uint8_t, 2> gains, Array<int32_t, 2> words, int threads) {
    const int64_t rows = y.shape(0), points = gains.shape(1);
    require(1 <= bits && bits <= 4 && static_cast<int64_t>(y.shape(1)) == 16 * points &&
                static_cast<int64_t>(gains.shape(0)) == rows && static_cast<int64_t>(words.shape(0)) == rows &&
                static_cast<int64_t>(words.shape(1)) == (points * (16 * bits + 4) + 31) / 32,
            "the arrays are not of one matrix");
    nb::gil_scoped_release free;
    numbers(bits, rows, points, y.data(), gains.data(), reinterpret_cast<uint32_t*>(words.data()), words.shape(1), threads);
}

Points points(const Layout& l, const Bytes& codes, const Bytes& gains, const Array<const float, 1>& lengths,
              const Array<const float, 1>& scales, const Array<const int32_t, 1>& starts, const Array<const int32_t, 1>& places,
              const Array<const int8_t, 2>& odd, int64_t columns) {
    check(l, codes.size());
    require(3 <= l.bits && l.bits <= 5 && l.rows_per_tile == 16 && l.group == 16 && l.group_blocks == 4 && l.columns % 16 == 0,
            "points have layouts of their own");
    require(l.columns - 16 < columns && columns <= l.columns, "there are other columns");
    require(gains.size() == static_cast<size_t>(l.tiles() * l.chunks() * 16) && lengths.size() == 256, "gains have another size");
    require(scales.size() == 1 || scales.size() == static_cast<size_t>(l.rows), "scales are of other rows");
    require(starts.size() == static_cast<size_t>(l.rows + 1) && starts.data()[0] == 0 &&
                starts.data()[l.rows] == static_cast<int64_t>(places.size()) && odd.shape(0) == places.size() && odd.shape(1) == 16,
            "the odd points are not the matrix's");
    return {l, codes.data(), gains.data(), lengths.data(), scales.data(), scales.size() > 1, starts.data(), places.data(), odd.data()};
}

void points_linear_of(const Layout& l, Bytes codes, Bytes gains, Array<const float, 1> lengths, Array<const float, 1> scales,
                      Array<const int32_t, 1> starts, Array<const int32_t, 1> places, Array<const int8_t, 2> odd, int act,
                      Array<const float, 2> x, Array<float, 2> y, int threads) {
    const Points w = points(l, codes, gains, lengths, scales, starts, places, odd, x.shape(1));
    require(0 <= act && act <= 1 && y.shape(0) == x.shape(0) && y.shape(1) == static_cast<size_t>(l.rows), "y has another shape");
    nb::gil_scoped_release free;
    points_linear(w, x.data(), x.shape(1), x.shape(0), static_cast<Act>(act), y.data(), threads);
}

void points_decode_of(const Layout& l, Bytes codes, Bytes gains, Array<const float, 1> lengths, Array<const float, 1> scales,
                      Array<const int32_t, 1> starts, Array<const int32_t, 1> places, Array<const int8_t, 2> odd, int64_t first,
                      Array<float, 2> out, int threads) {
    const Points w = points(l, codes, gains, lengths, scales, starts, places, odd, out.shape(1));
    require(0 <= first && first + static_cast<int64_t>(out.shape(0)) <= l.rows, "the rows are not the matrix's");
    nb::gil_scoped_release free;
    points_decode(w, out.shape(1), first, out.shape(0), out.data(), threads);
}

void rotate_of(Array<const int64_t, 2> steps, Array<const float, 1> numbers, Array<const int32_t, 1> orders,
               Array<float, 2> x, int threads) {
    static_assert(sizeof(RotationStep) == 6 * sizeof(int64_t));
    require(steps.shape(1) == 6, "a step has six numbers");
    const auto* all = reinterpret_cast<const RotationStep*>(steps.data());
    const int64_t width = x.shape(1);
    for (const RotationStep* s = all; s < all + steps.shape(0); ++s) {
        const bool permutes = s->turn == Turn::permute, matrix = s->turn == Turn::matrix;
        require(Turn::multiply <= s->turn && s->turn <= Turn::matrix && s->start >= 0 && s->width > 0 &&
                    s->start + s->width <= width && s->order > 0 && s->inner > 0 && s->at >= 0, "a step is out of range");
        require(permutes || s->turn == Turn::multiply || s->width % (s->order * s->inner) == 0, "a window has no such axis");
        require(s->turn != Turn::butterflies || (s->inner % 16 == 0 && (s->order & (s->order - 1)) == 0),
                "butterflies need powers of two, 16 apart");
        const int64_t used = matrix ? s->order * padded_order(s->order) : s->turn == Turn::butterflies ? 0 : s->width;
        require(s->at + used <= static_cast<int64_t>(permutes ? orders.size() : numbers.size()), "a step lacks numbers");
        for (int64_t i = 0; permutes && i < used; ++i)
            require(0 <= orders.data()[s->at + i] && orders.data()[s->at + i] < s->width, "an order is out of range");
    }
    nb::gil_scoped_release free;
    rotate({width, all, static_cast<int64_t>(steps.shape(0)), numbers.data(), orders.data()}, x.data(), x.shape(0), threads);
}

void sparse_add_of(Array<const int64_t, 1> starts, Bytes places, Array<const uint8_t, 1> values, Array<const float, 2> x,
                   Array<float, 2> y, int threads) {
    const size_t rows = y.shape(1), count = values.size() / 2;
    require(starts.size() == rows + 1 && starts.data()[0] == 0 && starts.data()[rows] == static_cast<int64_t>(count) &&
                (places.size() == 2 * count || places.size() == 4 * count) && x.shape(0) == y.shape(0),
            "the entries are not the matrix's");
    const Sparse s{static_cast<int64_t>(rows), static_cast<int64_t>(x.shape(1)), starts.data(), places.data(),
                   places.size() == 4 * count && count > 0, reinterpret_cast<const uint16_t*>(values.data())};
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
    m.def("bytes_to_layout", bytes_to_layout_of, "layout"_a, "codes"_a, "out"_a, "threads"_a);
    m.def("decode", decode_of, "layout"_a, "codes"_a, "tables"_a, "ids"_a.none(), "scales"_a, "zeros"_a, "first"_a, "out"_a,
          "threads"_a);
    m.def("codes_at", codes_at_rows, "layout"_a, "stored"_a, "rows"_a, "out"_a, "threads"_a);
    m.def("linear", linear_of, "layout"_a, "source"_a, "wide"_a, "mirrored"_a, "record_bytes"_a, "records_per_tile"_a, "bank_bits"_a,
          "zero"_a, "codes"_a, "tables"_a, "ids"_a.none(), "powers"_a.none(), "scales"_a.none(), "zeros"_a.none(),
          "row_scales"_a, "act"_a, "x"_a, "y"_a, "threads"_a);
    m.def("additive", additive_of, "layout"_a, "codes"_a, "books"_a, "scales"_a, "x"_a, "y"_a, "threads"_a);
    m.def("vector_linear", vector_linear_of, "set"_a, "group"_a, "bits"_a, "words"_a, "scales"_a, "table"_a, "x"_a, "y"_a,
          "threads"_a);
    m.def("vector_decode", vector_decode_of, "set"_a, "group"_a, "bits"_a, "words"_a, "scales"_a, "table"_a, "first"_a,
          "out"_a, "threads"_a);
    m.def("coordinates", coordinates_of, "bits"_a, "columns"_a, "words"_a, "y"_a, "gains"_a, "threads"_a);
    m.def("numbers", numbers_of, "bits"_a, "y"_a, "gains"_a, "words"_a, "threads"_a);
    m.def("points_linear", points_linear_of, "layout"_a, "codes"_a, "gains"_a, "lengths"_a, "scales"_a, "starts"_a, "places"_a,
          "odd"_a, "act"_a, "x"_a, "y"_a, "threads"_a);
    m.def("points_decode", points_decode_of, "layout"_a, "codes"_a, "gains"_a, "lengths"_a, "scales"_a, "starts"_a, "places"_a,
          "odd"_a, "first"_a, "out"_a, "threads"_a);
    m.def("rotate", rotate_of, "steps"_a, "numbers"_a, "orders"_a, "x"_a, "threads"_a);
    m.def("sparse_add", sparse_add_of, "starts"_a, "places"_a, "values"_a, "x"_a, "y"_a, "threads"_a);
    m.def("read_all", [](Bytes bytes, int threads) {
        nb::gil_scoped_release free;
        return read_all(bytes.data(), bytes.size(), threads);
    });
    m.def("isas", available_isas);
    m.def("isa", [] { return std::string(isa().name); });
    m.def("use_isa", use_isa);
}
