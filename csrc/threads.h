// A parallel loop over static ranges, one per thread, by OpenMP: torch brings the same runtime, so that no second pool of
// threads competes for the cores. Without OpenMP everything runs in the calling thread.
#pragma once
#include <algorithm>
#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace bitmill {

constexpr int64_t most_threads = 1024;

template <class Body>
void parallel_for(int64_t count, int threads, const Body& body) {
    threads = static_cast<int>(std::max<int64_t>(1, std::min({int64_t{threads}, count, most_threads})));
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        {
            const int64_t team = omp_get_num_threads(), self = omp_get_thread_num();
            body(count * self / team, count * (self + 1) / team);
        }
        return;
    }
#endif
    body(int64_t{0}, count);
}

}  // namespace bitmill
