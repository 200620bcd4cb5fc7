// The path of a trellis nearest to given numbers: numerics/trellis.py `encode`, operation by operation, in integers,
// so that both give the same bytes on every instruction set.
//
// Steps go from the last number to the first: a state's low bits are then the new ones, so that the states before it
// differ in their high bits, and minima are taken over whole vectors.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../simd/inline.h"
#include "vector.h"

namespace bitmill {

// The compiler's own vectors, as wide as those of the instruction set.
#if defined(__AVX2__)
constexpr int cost_lanes = 16;
#else
constexpr int cost_lanes = 8;
#endif
typedef int16_t Costs __attribute__((vector_size(2 * cost_lanes)));
typedef int16_t EightCosts __attribute__((vector_size(16)));
typedef int8_t Choices __attribute__((vector_size(cost_lanes)));

template <class V, int bits>
class Viterbi {
    static constexpr int N = trellis_block, window = trellis_window, lanes = cost_lanes;
    static constexpr int limits[] = {0, 31, 45, 52, 63};  // of differences, so that costs of all states fit 16 bits
    static constexpr int limit = limits[bits], shift = 5 - bits;

    const Trellis& w;
    const int64_t states, groups;  // a group of states has the same states before it
    const int penalty;             // of a start elsewhere: more than any detour costs
    std::vector<int16_t> cost, least;
    std::vector<uint8_t> back;  // (steps, groups): high bits of the state before

public:
    explicit Viterbi(const Trellis& w)
        : w(w), states(int64_t{1} << w.state_bits), groups(states >> bits),
          penalty((w.state_bits + bits - 1) / bits * limit * limit + 1), cost(states), least(groups + 8),
          back(std::max(N, 2 * window) * groups) {}

    // Codes (8 * bits) of x (N).
    void run(const int16_t* x, uint8_t* codes) {
        int16_t turned[2 * N];
        uint16_t path[N];
        for (int t = 0; t < N; ++t) turned[t] = turned[N + t] = x[N - 1 - t];
        around(turned, seam(turned), path);
        uint16_t half[N];
        around(turned + N / 2, path[N / 2 - 1], half);  // the present path is one of those compared
        write(codes, 0, [&](int t) { return half[(N - 1 - t + N / 2) % N]; });
    }

    // The same for numbers from `kept` on, 16 or more; those before keep their levels, and the seam its state.
    void run_rest(const int16_t* x, int kept, uint8_t* codes) {
        const auto state_at = [&](int t) {  // of the present codes
            uint32_t state = 0;
            for (int i = 0; i < w.state_bits; ++i) {
                const int bit = (bits * (t + 1) - w.state_bits + i + bits * N) % (bits * N);
                state |= static_cast<uint32_t>(codes[bit / 8] >> bit % 8 & 1) << i;
            }
            return static_cast<int>(state);
        };
        int16_t turned[N];
        uint16_t path[N];
        for (int t = 0; t < N; ++t) turned[t] = x[N - 1 - t];
        const int start = state_at(0), last = state_at(kept - 1) >> bits;
        forward(turned, N - kept, start);
        int state = last;
        for (int high = 1; high < 1 << bits; ++high) {
            const int other = last | high << (w.state_bits - bits);
            if (cost[other] < cost[state]) state = other;
        }
        trace(state, N - kept, path);
        write(codes, kept, [&](int t) { return path[N - 1 - t]; });
    }

private:
    // The state before x[0] of the best path through the numbers around it.
    int seam(const int16_t* x) {
        std::fill(cost.begin(), cost.end(), int16_t{0});
        for (int t = 0; t < 2 * window; ++t) step(x[N - window + t], back.data() + t * groups);
        int state = static_cast<int>(std::min_element(cost.begin(), cost.end()) - cost.begin());
        for (int t = 2 * window - 1; t >= window; --t) state = before(state, t);
        return state;
    }

    // The best path that starts and ends in a state.
    void around(const int16_t* x, int start, uint16_t* path) {
        forward(x, N, start);
        trace(start, N, path);
    }

    void forward(const int16_t* x, int count, int start) {
        std::fill(cost.begin(), cost.end(), static_cast<int16_t>(penalty));
        cost[start] = 0;
        for (int t = 0; t < count; ++t) step(x[t], back.data() + t * groups);
    }

    void trace(int state, int count, uint16_t* path) const {
        for (int t = count - 1; t >= 0; --t) {
            path[t] = static_cast<uint16_t>(state);
            state = before(state, t);
        }
    }

    // The bits of the states of numbers from `first` on, a multiple of 16.
    template <class State>
    void write(uint8_t* codes, int first, const State& state) const {
        uint32_t held = 0;
        int count = 0;
        codes += first / 8 * bits;
        for (int t = first; t < N; ++t) {
            held |= static_cast<uint32_t>(state(t) >> (w.state_bits - bits)) << count;
            for (count += bits; count >= 8; count -= 8, held >>= 8) *codes++ = static_cast<uint8_t>(held);
        }
    }

    int before(int state, int t) const {
        const int group = state >> bits;
        return group | back[t * groups + group] << (w.state_bits - bits);
    }

    BITMILL_NOINLINE void step(int16_t x, uint8_t* choices) {
        int16_t* costs = cost.data();
        int16_t* best = least.data();
        Costs low = Costs{} + int16_t{32767};
        for (int64_t g = 0; g < groups; g += lanes) {
            Costs found = load(costs + g), choice = {};
            for (int high = 1; high < 1 << bits; ++high) {
                const Costs other = load(costs + high * groups + g);
                const auto less = other < found;
                choice = less ? Costs{} + static_cast<int16_t>(high) : choice;
                found = less ? other : found;
            }
            store(best + g, found);
            const Choices narrow = __builtin_convertvector(choice, Choices);
            std::memcpy(choices + g, &narrow, sizeof narrow);
            low = found < low ? found : low;
        }
        int16_t lowest = 32767;
        for (int i = 0; i < lanes; ++i) lowest = std::min(lowest, static_cast<int16_t>(low[i]));
        const Costs goal = Costs{} + static_cast<int16_t>(x + (1 << shift >> 1)), offset = Costs{} + lowest,
                    most = Costs{} + int16_t{limit};
        for (int64_t s = 0; s < states; s += lanes) {
            Costs d = (goal - load(w.levels + s)) >> shift;
            d = d < most ? d : most;
            d = d > -most ? d : -most;
            store(costs + s, spread(best + (s >> bits)) - offset + d * d);
        }
    }

    static BITMILL_INLINE Costs load(const int16_t* p) {
        Costs v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }

    static BITMILL_INLINE void store(int16_t* p, Costs v) { std::memcpy(p, &v, sizeof v); }

    // p[0], 2^bits times, then p[1], ...
    static BITMILL_INLINE Costs spread(const int16_t* p) {
        EightCosts v;
        std::memcpy(&v, p, sizeof v);
        constexpr int b = bits;
#if !defined(__AVX2__)
        return __builtin_shufflevector(v, v, 0, 1 >> b, 2 >> b, 3 >> b, 4 >> b, 5 >> b, 6 >> b, 7 >> b);
#else
        return __builtin_shufflevector(v, v, 0, 1 >> b, 2 >> b, 3 >> b, 4 >> b, 5 >> b, 6 >> b, 7 >> b, 8 >> b, 9 >> b,
                                       10 >> b, 11 >> b, 12 >> b, 13 >> b, 14 >> b, 15 >> b);
#endif
    }
};

// Codes (count, 8 * bits) of x (count, trellis_block); the first `kept` numbers of blocks keep theirs.
template <class V, int bits>
void trellis_codes_of(const Trellis& w, int64_t count, const int16_t* x, int kept, uint8_t* codes) {
    Viterbi<V, bits> paths(w);
    for (int64_t n = 0; n < count; ++n, x += trellis_block, codes += trellis_block / 8 * bits) {
        if (kept) paths.run_rest(x, kept, codes);
        else paths.run(x, codes);
    }
}

template <class V>
void trellis_codes_with(const Trellis& w, int64_t count, const int16_t* x, int kept, uint8_t* codes) {
    constexpr void (*of[])(const Trellis&, int64_t, const int16_t*, int, uint8_t*) = {
        trellis_codes_of<V, 1>, trellis_codes_of<V, 2>, trellis_codes_of<V, 3>, trellis_codes_of<V, 4>};
    of[w.bits - 1](w, count, x, kept, codes);
}

}  // namespace bitmill
