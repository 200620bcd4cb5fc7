// All kernels of one instruction set; its lookup kernels are compiled from lookup.cpp.
#include "vectors.h"

#include "../additive/additive-inl.h"
#include "../fixed/fixed-inl.h"
#include "../isa.h"
#include "../kv/kv-inl.h"
#include "../lut/decode-inl.h"
#include "../lut/inputs-inl.h"
#include "../lut/lookup-inl.h"
#include "../rotation/rotation-inl.h"
#include "../solve/solve-inl.h"
#include "../sparse/sparse-inl.h"
#include "../step/step-inl.h"
#include "../vector/vector-inl.h"

namespace bitmill {
namespace {

template <class V>
constexpr Isa isa_of(const char* name, const LookupKernels* lookup) {
    return {name, lookup, decode_rows_with<V>, read_inputs<V>, &additive_kernels<V>, &vector_kernels<V>, &rotation_kernels<V>,
            &sparse_kernels<V>, &fixed_kernels<V>, &step_kernels<V>, &kv_kernels<V>, &solve_kernels<V>};
}

}  // namespace

const Isa BITMILL_NAMED(isa) = isa_of<VectorStreams>(isa_name, &BITMILL_NAMED(lookup));

}  // namespace bitmill
