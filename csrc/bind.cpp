// The Python module: arrays of any library by DLPack, no library's headers.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>

#include "lut/linear.h"

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
    require(l.rows_per_tile == 16 || l.rows_per_tile == 4 || l.rows_per_tile == 1, "rows_per_tile is 16, 4 or 1");
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

void linear_of(const Layout& l, int source, bool wide, int64_t record_bytes, int64_t records_per_tile, int bank_bits,
               float zero, Bytes codes, Bytes tables, std::optional<Bytes> ids, std::optional<Array<const float, 1>> powers,
               std::optional<Bytes> scales, std::optional<Bytes> zeros, Array<const float, 1> row_scales, int act,
               Array<const float, 2> x, Array<float, 2> y, int threads) {
    check(l, codes.size());
    const size_t places = l.tiles() * l.padded_groups() * l.rows_per_tile;
    const bool halves = zeros && zeros->size() == 2 * places;
    const Source kind = static_cast<Source>(source);
    require(0 <= source && source <= 2 && 0 <= act && act <= 1, "an enumeration is out of range");
    require(0 < bank_bits + 1 && bank_bits <= 5, "a bank has up to 32 tables");
    const size_t least = l.bits <= 6 ? 64 : l.bits == 7 ? 128 : 256;
    if (kind == Source::bank) {
        require(ids && ids->size() == places && powers && powers->size() == 16, "a bank needs ids and 16 powers");
        require(tables.size() >= (l.bits == 4 ? 512u : l.bits == 3 ? 256u : 128u), "the bank is too small");
    } else {
        const size_t lanes = l.rows_per_tile > 1 && kind == Source::own && l.bits == 3 ? 128 : 64;
        require(static_cast<size_t>(record_bytes) == std::max(least, lanes) * (wide ? 2 : 1), "records have another size");
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
    Weights w{l, kind, wide, codes.data(), tables.data(), record_bytes, records_per_tile,
              ids ? ids->data() : nullptr, bank_bits, powers ? powers->data() : nullptr,
              scales ? static_cast<const void*>(scales->data()) : nullptr, wide_scales,
              !zeros ? Zero::constant : halves ? Zero::halves : Zero::bytes, zero,
              zeros ? static_cast<const void*>(zeros->data()) : nullptr, row_scales.data()};
    nb::gil_scoped_release free;
    linear(w, x.data(), x.shape(0), static_cast<Act>(act), y.data(), threads);
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
    m.def("linear", linear_of, "layout"_a, "source"_a, "wide"_a, "record_bytes"_a, "records_per_tile"_a, "bank_bits"_a,
          "zero"_a, "codes"_a, "tables"_a, "ids"_a.none(), "powers"_a.none(), "scales"_a.none(), "zeros"_a.none(),
          "row_scales"_a, "act"_a, "x"_a, "y"_a, "threads"_a);
    m.def("read_all", [](Bytes bytes, int threads) {
        nb::gil_scoped_release free;
        return read_all(bytes.data(), bytes.size(), threads);
    });
    m.def("isas", available_isas);
    m.def("isa", [] { return std::string(isa().name); });
    m.def("use_isa", use_isa);
}
