// All kernels but those of lut/, which have sources of their own: they are many, and slow to compile.
#pragma once
#include "../additive/kernel.h"
#include "../fixed/kernel.h"
#include "../isa.h"
#include "../kv/kernel.h"
#include "../lut/decode.h"
#include "../lut/inputs.h"
#include "../lut/kernel.h"
#include "../rotation/kernel.h"
#include "../sparse/kernel.h"
#include "../step/kernel.h"
#include "../vector/kernel.h"

namespace bitmill {

template <class V>
constexpr Isa isa_of(const char* name, const LookupKernels* lookup) {
    return {name, lookup, decode_rows_with<V>, read_inputs<V>, &additive_kernels<V>, &vector_kernels<V>, &rotation_kernels<V>,
            &sparse_kernels<V>, &fixed_kernels<V>, &step_kernels<V>, &kv_kernels<V>};
}

}  // namespace bitmill
