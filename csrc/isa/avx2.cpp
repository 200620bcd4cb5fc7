#include "../simd/avx2.h"

#include "list.h"

namespace bitmill {
const Isa avx2_isa = isa_of<Avx2>("avx2", &avx2_lookup);
}  // namespace bitmill
