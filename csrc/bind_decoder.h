// Decoders of the Python module, put together from parts (step/decoder.h).
#pragma once
#include "arrays.h"
#include "step/step.h"

namespace bitmill {

using Floats = Array<const float, 1>;
using MaybeFloats = std::optional<Floats>;

// The data of an optional array, which must have so many numbers.
inline const float* numbers(const MaybeFloats& values, int64_t count, const char* what) {
    require(!values || static_cast<int64_t>(values->size()) == count, what);
    return values ? values->data() : nullptr;
}

void bind_decoder(nb::module_& m);

}  // namespace bitmill
