#include "../simd/avx2.h"

#include "choose.h"
#include "floats.h"
#include "panel.h"

namespace bitmill {
const LookupKernels avx2_lookup = {choose<Avx2>, float_kernel<Avx2, 1>, choose_panel<Avx2>};
}  // namespace bitmill
