#include "../simd/neon.h"

#include "choose.h"
#include "floats.h"
#include "panel.h"

namespace bitmill {
const LookupKernels neon_lookup = {choose<Neon>, float_kernel<Neon, 1>, choose_panel<Neon>};
}  // namespace bitmill
