#include "../simd/avx2_streams.h"

#include "list.h"

namespace bitmill {
const Isa avx2_isa = isa_of<Avx2Streams>("avx2", &avx2_lookup);
}  // namespace bitmill
