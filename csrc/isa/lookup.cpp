// The lookup kernels of one instruction set. They have a source file of their own: they are many and slow to compile.
// Those of plain C++ are in lut/scalar.cpp.
#include "vectors.h"

#include "../lut/choose-inl.h"
#include "../lut/floats-inl.h"
#include "../lut/panel-inl.h"

namespace bitmill {
const LookupKernels BITMILL_NAMED(lookup) = {choose<Vectors16>, float_kernel<Vectors16, 1>, choose_panel<Vectors16>};
}  // namespace bitmill
