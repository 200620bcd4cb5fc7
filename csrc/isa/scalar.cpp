#include "../simd/scalar.h"

#include "list.h"

namespace bitmill {
const Isa scalar_isa = isa_of<Scalar>("scalar", &scalar_lookup);
}  // namespace bitmill
