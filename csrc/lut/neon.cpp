#include "../simd/neon.h"

#include "choose.h"
#include "floats.h"

namespace bitmill {
const LookupKernels neon_lookup = {choose<Neon>, float_kernel<Neon, 1>};
}  // namespace bitmill
