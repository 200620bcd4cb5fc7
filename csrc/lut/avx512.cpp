#include "../simd/avx512.h"

#include "choose.h"
#include "floats.h"
#include "panel.h"

namespace bitmill {
const LookupKernels avx512_lookup = {choose<Avx512>, float_kernel<Avx512, 1>, choose_panel<Avx512>};
}  // namespace bitmill
