// The threads of one parallel region that lasts a whole token. A small model has hundreds of products a token: starting
// a region for each would cost more than many of them, a wait costs a fraction of a microsecond.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <utility>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace bitmill {

class Barrier {
public:
    // Returns once `count` threads have arrived; all then see what they wrote before.
    void wait(int count) {
        if (count == 1) return;
        const uint32_t now = turn.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
            arrived.store(0, std::memory_order_relaxed);
            turn.store(now + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; turn.load(std::memory_order_acquire) == now; ++spins) {
            // another process may occupy the core of a thread: let it have this one too
            if (spins < patience) pause();
            else if (spins < patience + courtesy) std::this_thread::yield();
            else std::this_thread::sleep_for(std::chrono::microseconds(50));
        }
    }

private:
    static constexpr int patience = 2000, courtesy = 100;  // rounds that spin, and then rounds that yield
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<uint32_t> turn{0};

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }
};

// A thread's view of the team.
struct Team {
    int self, count;
    Barrier* barrier;

    void wait() const { barrier->wait(count); }
    std::pair<int64_t, int64_t> share(int64_t all) const { return {all * self / count, all * (self + 1) / count}; }
};

// body(team) on that many threads.
template <class Body>
void in_team(int threads, const Body& body) {
    Barrier barrier;
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        body(Team{omp_get_thread_num(), omp_get_num_threads(), &barrier});
        return;
    }
#endif
    body(Team{0, 1, &barrier});
}

}  // namespace bitmill
