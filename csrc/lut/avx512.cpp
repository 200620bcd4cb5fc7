#include "../simd/avx512.h"

#include "choose.h"
#include "floats.h"

namespace bitmill {
const LookupKernels avx512_lookup = {choose<Avx512>, float_kernel<Avx512, 1>};
}  // namespace bitmill
