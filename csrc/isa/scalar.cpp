#include "../simd/scalar_streams.h"

#include "list.h"

namespace bitmill {
const Isa scalar_isa = isa_of<ScalarStreams>("scalar", &scalar_lookup);
}  // namespace bitmill
