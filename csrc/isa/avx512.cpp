#include "../simd/avx512.h"

#include "list.h"

namespace bitmill {
const Isa avx512_isa = isa_of<Avx512>("avx512", &avx512_lookup);
}  // namespace bitmill
