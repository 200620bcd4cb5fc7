#include "solve.h"

#include "../isa.h"
#include "../threads.h"

namespace bitmill {

void round_with_feedback(const Columns& c, const Feedback& f, int threads) {
    const auto& best = *isa().solve;
    parallel_for(c.rows, threads, [&](int64_t first, int64_t last) { best.feedback(c, f, first, last); });
}

void round_by_descent(const Columns& c, const Descend& d, int threads) {
    const auto& best = *isa().solve;
    parallel_for(c.rows, threads, [&](int64_t first, int64_t last) { best.descend(c, d, first, last); });
}

void cheapest_codings(const Codings& c, int threads) {
    const auto& best = *isa().solve;
    parallel_for(c.count, threads, [&](int64_t first, int64_t last) { best.codings(c, first, last); });
}

}  // namespace bitmill
