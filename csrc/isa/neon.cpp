#include "../simd/neon.h"

#include "list.h"

namespace bitmill {
const Isa neon_isa = isa_of<Neon>("neon", &neon_lookup);
}  // namespace bitmill
