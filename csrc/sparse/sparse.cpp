#include "sparse.h"

#include "../isa.h"
#include "../threads.h"

namespace bitmill {

void sparse_add(const Sparse& s, const float* x, int64_t tokens, float* y, int threads) {
    const auto& best = *isa().sparse;
    parallel_for(s.rows, threads, [&](int64_t first, int64_t last) { best.add(s, x, tokens, y, first, last); });
}

}  // namespace bitmill
