#include "../simd/avx2.h"

#include "choose.h"

namespace bitmill {
const Isa avx2_isa = {"avx2", choose<Avx2>, read_inputs<Avx2>};
}  // namespace bitmill
