#include "rotation.h"

#include <vector>

#include "../isa.h"
#include "../threads.h"

namespace bitmill {

void rotate(const Rotation& rotation, float* x, int64_t tokens, int threads) {
    const auto& best = *isa().rotation;
    parallel_for(tokens, threads, [&](int64_t first, int64_t last) {
        thread_local std::vector<float> spare;
        spare.resize(rotation.width);
        for (int64_t t = first; t < last; ++t) best.rotate(rotation, x + t * rotation.width, spare.data());
    });
}

}  // namespace bitmill
