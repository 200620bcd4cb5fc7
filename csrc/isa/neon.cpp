#include "../simd/neon_streams.h"

#include "list.h"

namespace bitmill {
const Isa neon_isa = isa_of<NeonStreams>("neon", &neon_lookup);
}  // namespace bitmill
