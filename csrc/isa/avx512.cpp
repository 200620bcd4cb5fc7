#include "../simd/avx512_streams.h"

#include "list.h"

namespace bitmill {
const Isa avx512_isa = isa_of<Avx512Streams>("avx512", &avx512_lookup);
}  // namespace bitmill
