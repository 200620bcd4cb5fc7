#include "../simd/avx512.h"

#include "choose.h"

namespace bitmill {
const Isa avx512_isa = {"avx512", choose<Avx512>, read_inputs<Avx512>};
}  // namespace bitmill
