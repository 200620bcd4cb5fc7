#include "arrays.h"

#include <algorithm>


namespace bitmill {

namespace {

constexpr int64_t most_columns = int64_t{1} << 31, most_codes = int64_t{1} << 40;  // sizes in bytes fit 63 bits

// Rows' starts in the order of a list of `count` entries.
template <class T>
bool ordered(const Array<const T, 1>& starts, int64_t rows, int64_t count) {
    if (static_cast<int64_t>(starts.size()) != rows + 1 || starts.data()[0] != 0 || starts.data()[rows] != count)
        return false;
    for (int64_t r = 0; r < rows; ++r)
        if (starts.data()[r] > starts.data()[r + 1]) return false;
    return true;
}

template <class T>
bool all_below(const T* numbers, size_t count, int64_t limit) {
    T most = 0;
    for (size_t i = 0; i < count; ++i) most = std::max(most, numbers[i]);
    return !count || static_cast<int64_t>(most) < limit;
}

}  // namespace

void check(const Layout& l) {
    require(l.rows > 0 && l.columns > 0 && l.group > 0 && 1 <= l.bits && l.bits <= 8,
            "a layout is out of range");
    require(l.rows < most_columns && l.columns < most_columns && l.rows <= most_codes / l.columns,
            "a layout is too large");
    const int R = l.rows_per_tile;
    require(R == 64 || R == 16 || R == 4 || R == 1, "rows_per_tile is 64, 16, 4 or 1");
    const int64_t f = l.group_blocks, needed = (std::min(l.group, l.columns) + l.block_columns() - 1) / l.block_columns();
    require(f > 0 && (f % 8 == 0 || f == 2 || f == 4), "group_blocks is 2, 4 or a multiple of 8");
    require(f >= needed, "group_blocks are fewer than a group needs");
    require(f <= (needed + 7) / 8 * 8, "group_blocks are more than a group needs");
}

void check(const Layout& l, size_t code_bytes) {
    check(l);
    require(code_bytes == static_cast<size_t>(l.tiles() * l.tile_bytes()),
            "codes are not of the layout's size");
}

Weights lookup_weights(const Layout& l, int source, bool wide, bool mirrored, int64_t record_bytes,
                       int64_t records_per_tile, int bank_bits, float zero, const Bytes& codes,
                       const Bytes& tables, const Some& ids,
                       const std::optional<Array<const float, 1>>& powers, const Some& scales,
                       const Some& zeros, const Array<const float, 1>& row_scales, int act) {
    check(l, codes.size());
    const size_t places = l.tiles() * l.padded_groups() * l.rows_per_tile;
    const bool halves = zeros && zeros->size() == 2 * places;
    const Source kind = static_cast<Source>(source);
    require(0 <= source && source <= 2 && 0 <= act && act <= 2, "an enumeration is out of range");
    require(0 < bank_bits + 1 && bank_bits <= 5, "a bank has up to 32 tables");
    const bool floats = act == static_cast<int>(Act::float32), bank = kind == Source::bank;
    const bool lanes = l.rows_per_tile > 1 && kind == Source::own;
    require(!mirrored || (lanes && !floats && (l.bits == 3 || l.bits == 4)),
            "only rows' own tables of 3 or 4 bits are mirrored");
    if (bank) {
        const bool two = l.bits == 3 || (l.bits == 4 && l.rows_per_tile == 16);
        const size_t least = floats ? size_t{4} << (bank_bits + l.bits) : two ? 256 : l.bits == 4 ? 512 : 128;
        require(!floats || l.bits < 4 || l.rows_per_tile < 16, "sums are of bytes");
        require(ids && ids->size() == places && powers && powers->size() == 16,
                "a bank needs ids and 16 powers");
        require(all_below(ids->data(), places, int64_t{16} << bank_bits), "there is no such power");
        require(tables.size() >= least, "the bank is too small");
        require(record_bytes == 0 && records_per_tile == 0, "a bank has no records");
    } else {
        const int64_t whole = l.bits <= 6 ? 64 : l.bits == 7 ? 128 : 256;
        const int64_t one = lanes ? (l.bits == 3 ? 128 : 64) / (mirrored ? 2 : 1) : whole;
        require(
            record_bytes == (floats ? 4 * float_record(l.bits, l.rows_per_tile, kind) : one * (wide ? 2 : 1)),
            "records have another size");
        require(records_per_tile == 0 || records_per_tile == 1 || records_per_tile == l.padded_groups(),
                "records_per_tile is 0, 1 or the number of groups");
        require((kind == Source::shared) == (records_per_tile == 0),
                "shared tables, and they alone, are one record");
        const int64_t records = records_per_tile ? l.tiles() * records_per_tile : 1;
        require(tables.size() == static_cast<size_t>(records * record_bytes),
                "tables are not of the layout's size");
    }
    const bool wide_scales = scales && scales->size() == 4 * places;
    require(!scales || wide_scales || scales->size() == 2 * places, "scales are not of the layout's size");
    require(!zeros || halves || zeros->size() == places, "zeros are not of the layout's size");
    require(row_scales.size() == static_cast<size_t>(l.tiles() * l.rows_per_tile),
            "row scales have another size");
    return {l, kind, wide, codes.data(), tables.data(), mirrored, record_bytes, records_per_tile,
            ids ? ids->data() : nullptr, bank_bits, powers ? powers->data() : nullptr,
            scales ? static_cast<const void*>(scales->data()) : nullptr, wide_scales,
            !zeros ? Zero::constant : halves ? Zero::halves : Zero::bytes, zero,
            zeros ? static_cast<const void*>(zeros->data()) : nullptr, row_scales.data()};
}

Additive additive_weights(const Layout& l, const Bytes& codes, const Array<const float, 3>& books,
                          const Bytes& scales, int64_t columns) {
    check(l, codes.size());
    const Additive w{l, static_cast<int>(books.shape(1)), static_cast<int>(books.shape(0)), codes.data(),
                     books.data(), reinterpret_cast<const uint16_t*>(scales.data())};
    require(l.rows_per_tile == Additive::rows && l.group_blocks % 8 == 0,
            "the layout has tiles of 64 rows and whole chunks");
    require(w.codebooks > 0 && w.width > 0 && l.columns % w.codebooks == 0 && l.group % w.codebooks == 0,
            "blocks have a code of every codebook");
    require(books.shape(2) == static_cast<size_t>(w.entries()), "codebooks are repeated to 64 or 256 entries");
    require(scales.size() == static_cast<size_t>(2 * l.tiles() * l.groups() * Additive::rows),
            "scales have another size");
    require(columns <= l.columns / w.codebooks * w.width && columns > (l.columns / w.codebooks - 1) * w.width,
            "the columns are not the codes'");
    return w;
}

int state_bits_of(size_t states) {
    for (int bits = 8; bits <= 16; ++bits)
        if (states == size_t{1} << bits) return bits;
    require(false, "a trellis has 2^8 to 2^16 states");
    return 0;
}

Vectors vectors(int set, int64_t columns, int64_t group, int bits, const Array<const int32_t, 2>& words,
                const Array<const float, 2>& scales, const Array<const float, 1>& table) {
    const bool e8 = set == 0, trellis = set == 2;
    require(0 <= set && set <= 2 && 1 <= bits && bits <= 4 && 0 < columns && columns < most_columns && 0 < group &&
                group < most_columns,
            "a vector format is out of range");
    const int64_t width = e8 ? 8 : trellis ? trellis_block : 16, blocks = (columns + width - 1) / width, rows = words.shape(0);
    require(static_cast<int64_t>(words.shape(1)) * 32 >= blocks * (e8 ? 16 : trellis ? trellis_block * bits : 16 * bits + 4),
            "words are too few");
    require(group % width == 0 && static_cast<int64_t>(scales.shape(1)) >= (blocks * width - 1) / group + 1,
            "scales are too few");
    require(scales.shape(0) == 1 || static_cast<int64_t>(scales.shape(0)) == rows, "scales are of other rows");
    const int state_bits = trellis ? state_bits_of(table.size()) : 0;
    require(trellis || table.size() == (e8 ? 2048u : 16u), "the table has another size");
    return {static_cast<VectorSet>(set), rows, columns, group, reinterpret_cast<const uint32_t*>(words.data()),
            static_cast<int64_t>(words.shape(1)), scales.data(), static_cast<int64_t>(scales.shape(1)),
            scales.shape(0) > 1, bits, table.data(), state_bits};
}

Points points(const Layout& l, const Bytes& codes, const Bytes& gains, const Array<const float, 1>& lengths,
              const Array<const float, 1>& scales, const Array<const int32_t, 1>& starts,
              const Array<const int32_t, 1>& places, const Array<const int8_t, 2>& odd, int64_t columns) {
    check(l, codes.size());
    require(3 <= l.bits && l.bits <= 5 && l.rows_per_tile == 16 && l.group == 16 && l.group_blocks == 4 &&
                l.columns % 16 == 0,
            "points have layouts of their own");
    require(l.columns - 16 < columns && columns <= l.columns, "there are other columns");
    require(gains.size() == static_cast<size_t>(l.tiles() * l.chunks() * 16) && lengths.size() == 256,
            "gains have another size");
    require(scales.size() == 1 || scales.size() == static_cast<size_t>(l.rows), "scales are of other rows");
    require(ordered(starts, l.rows, places.size()) && odd.shape(0) == places.size() && odd.shape(1) == 16,
            "the odd points are not the matrix's");
    for (size_t i = 0; i < places.size(); ++i)
        require(0 <= places.data()[i] && places.data()[i] < l.columns / 16, "an odd point is outside its row");
    return {l, codes.data(), gains.data(), lengths.data(), scales.data(), scales.size() > 1, starts.data(),
            places.data(), odd.data()};
}

Lattice lattice(const Layout& l, const Bytes& codes, const Bytes& sizes, const Array<const float, 1>& scales,
                int64_t columns) {
    check(l, codes.size());
    require(l.bits == 2 && l.rows_per_tile == 16 && l.columns % 32 == 0 && l.group == l.columns &&
                l.group_blocks == l.columns / 4,
            "a lattice has a layout of its own");
    require(l.columns - 32 < columns && columns <= l.columns, "there are other columns");
    require(sizes.size() == 512, "the table has another size");
    require(scales.size() == 1 || scales.size() == static_cast<size_t>(l.rows), "scales are of other rows");
    return {l, codes.data(), sizes.data(), scales.data(), scales.size() > 1};
}

Rotation rotation(const Array<const int64_t, 2>& steps, const Array<const float, 1>& numbers,
                  const Array<const int32_t, 1>& orders, int64_t width) {
    static_assert(sizeof(RotationStep) == 6 * sizeof(int64_t));
    require(steps.shape(1) == 6, "a step has six numbers");
    const auto* all = reinterpret_cast<const RotationStep*>(steps.data());
    for (const RotationStep* s = all; s < all + steps.shape(0); ++s) {
        const bool permutes = s->turn == Turn::permute, matrix = s->turn == Turn::matrix;
        require(Turn::multiply <= s->turn && s->turn <= Turn::matrix && s->start >= 0 && s->width > 0 &&
                    inside(s->start, s->width, width) && 0 < s->order && s->order <= width && 0 < s->inner &&
                    s->inner <= width && s->at >= 0,
                "a step is out of range");
        require(permutes || s->turn == Turn::multiply || s->width % (s->order * s->inner) == 0,
                "a window has no such axis");
        require(s->turn != Turn::butterflies || (s->inner % 16 == 0 && (s->order & (s->order - 1)) == 0),
                "butterflies need powers of two, at a stride of 16");
        const int64_t most = s->turn == Turn::butterflies ? 0 : s->width;
        const int64_t used = matrix ? s->order * padded_order(s->order) : most;
        require(inside(s->at, used, permutes ? orders.size() : numbers.size()), "a step lacks numbers");
        for (int64_t i = 0; permutes && i < used; ++i)
            require(0 <= orders.data()[s->at + i] && orders.data()[s->at + i] < s->width,
                    "an order is out of range");
    }
    return {width, all, static_cast<int64_t>(steps.shape(0)), numbers.data(), orders.data()};
}

Sparse sparse(const Array<const int64_t, 1>& starts, const Bytes& places,
              const Array<const uint8_t, 1>& values, int64_t rows, int64_t columns) {
    const size_t count = values.size() / 2;
    const bool wide = places.size() == 4 * count && count > 0;
    require(values.size() % 2 == 0 && (wide || places.size() == 2 * count) && ordered(starts, rows, count),
            "the entries are not the matrix's");
    require(wide ? all_below(reinterpret_cast<const uint32_t*>(places.data()), count, columns)
                 : all_below(reinterpret_cast<const uint16_t*>(places.data()), count, columns),
            "a place is outside the matrix");
    return {rows, columns, starts.data(), places.data(), wide,
            reinterpret_cast<const uint16_t*>(values.data())};
}

Levels levels(const Layout& l, const Bytes& codes, const Array<const float, 1>& tables,
              const std::optional<Array<const int32_t, 2>>& ids, const Array<const float, 2>& scales,
              const Array<const float, 2>& zeros, int64_t first, int64_t rows) {
    check(l, codes.size());
    require(l.rows_per_tile <= 16, "a tile has up to 16 rows");
    const auto fits = [&](size_t own_rows, size_t groups) {
        return (own_rows == 1 || static_cast<int64_t>(own_rows) == rows) &&
               (groups == 1 || groups == static_cast<size_t>(l.groups()));
    };
    require(fits(scales.shape(0), scales.shape(1)) && fits(zeros.shape(0), zeros.shape(1)) &&
                (!ids || fits(ids->shape(0), ids->shape(1))), "numbers are of other groups");
    const int64_t one = int64_t{1} << l.bits, count = (static_cast<int64_t>(tables.size()) - 64) / one;
    require(count > 0, "the tables are too small");
    for (size_t i = 0; ids && i < ids->size(); ++i)
        require(0 <= ids->data()[i] && ids->data()[i] < count, "there is no such table");
    const auto size = [](const auto& a, int i) { return static_cast<int64_t>(a.shape(i)); };
    return {l, codes.data(), first, tables.data(), ids ? ids->data() : nullptr, scales.data(), zeros.data(),
            ids ? size(*ids, 0) : 1, ids ? size(*ids, 1) : 1, size(scales, 0), size(scales, 1), size(zeros, 0), size(zeros, 1)};
}

}  // namespace bitmill
