// Arrays of the Python module as what the kernels take. Every function checks what these must not meet, shapes that do
// not fit each other, and throws std::invalid_argument.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>
#include <stdexcept>

#include "additive/additive.h"
#include "lut/levels.h"
#include "lut/lookup.h"
#include "rotation/rotation.h"
#include "sparse/sparse.h"
#include "vector/vector.h"

namespace bitmill {

namespace nb = nanobind;

template <class T, int dims>
using Array = nb::ndarray<T, nb::ndim<dims>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const uint8_t, nb::c_contig, nb::device::cpu>;
using Some = std::optional<Bytes>;

// An array argument that must have the type and order the kernels read: nothing is silently copied into another.
inline auto operator""_as_is(const char* name, size_t) { return nb::arg(name).noconvert(); }

inline void require(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
}

// True if `count` numbers from `first` on are among `all`, without an overflow of their sum.
inline bool inside(int64_t first, int64_t count, int64_t all) {
    return 0 <= first && 0 <= count && count <= all && first <= all - count;
}

void check(const Layout& layout);
void check(const Layout& layout, size_t code_bytes);

Weights lookup_weights(const Layout& l, int source, bool wide, bool mirrored, int64_t record_bytes,
                       int64_t records_per_tile, int bank_bits, float zero, const Bytes& codes,
                       const Bytes& tables, const Some& ids,
                       const std::optional<Array<const float, 1>>& powers, const Some& scales,
                       const Some& zeros, const Array<const float, 1>& row_scales, int act);
// Numbers are of one row or of `rows` from `first` on, of one group or of each.
Levels levels(const Layout& l, const Bytes& codes, const Array<const float, 1>& tables,
              const std::optional<Array<const int32_t, 2>>& ids, const Array<const float, 2>& scales,
              const Array<const float, 2>& zeros, int64_t first, int64_t rows);
Additive additive_weights(const Layout& l, const Bytes& codes, const Array<const float, 3>& books,
                          const Bytes& scales, int64_t columns);
// Bits of the state of a trellis with so many states.
int state_bits_of(size_t states);
Vectors vectors(int set, int64_t columns, int64_t group, int bits, const Array<const int32_t, 2>& words,
                const Array<const float, 2>& scales, const Array<const float, 1>& table);
// columns: of the matrix, whose last point may be cut.
Points points(const Layout& l, const Bytes& codes, const Bytes& gains, const Array<const float, 1>& lengths,
              const Array<const float, 1>& scales, const Array<const int32_t, 1>& starts,
              const Array<const int32_t, 1>& places, const Array<const int8_t, 2>& odd, int64_t columns);
Lattice lattice(const Layout& l, const Bytes& codes, const Bytes& sizes, const Array<const float, 1>& scales,
                int64_t columns);
Rotation rotation(const Array<const int64_t, 2>& steps, const Array<const float, 1>& numbers,
                  const Array<const int32_t, 1>& orders, int64_t width);
Sparse sparse(const Array<const int64_t, 1>& starts, const Bytes& places,
              const Array<const uint8_t, 1>& values, int64_t rows, int64_t columns);

void bind_step(nb::module_& m);
void bind_solve(nb::module_& m);
void bind_kv(nb::module_& m);

}  // namespace bitmill
