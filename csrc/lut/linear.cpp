#include "linear.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "../threads.h"
#include "inputs.h"

namespace bitmill {
namespace {

// Codes that all tokens visit before the next ones are read: they stay in a core's second-level cache.
constexpr int64_t cached_bytes = 256 << 10;

std::vector<const Isa*> known_isas() {
    std::vector<const Isa*> known;
#ifdef BITMILL_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") &&
        __builtin_cpu_supports("avx512vnni"))
        known.push_back(&avx512_isa);
    if (avx2) known.push_back(&avx2_isa);
#endif
    known.push_back(&scalar_isa);
    return known;
}

const Isa* find(const std::string& name) {
    std::string names;
    for (const Isa* one : known_isas()) {
        if (name == one->name) return one;
        names += (names.empty() ? "" : ", ") + std::string(one->name);
    }
    throw std::invalid_argument("the instruction set '" + name + "' is not among those of this machine: " + names);
}

const Isa*& current() {
    static const Isa* chosen = [] {
        const char* wanted = std::getenv("BITMILL_ISA");
        return wanted && *wanted ? find(wanted) : known_isas().front();
    }();
    return chosen;
}

}  // namespace

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Isa* one : known_isas()) names.emplace_back(one->name);
    return names;
}

const Isa& isa() { return *current(); }

void use_isa(const std::string& name) { current() = find(name); }

uint64_t read_all(const uint8_t* bytes, int64_t count, int threads) {
    std::atomic<uint64_t> total{0};
    in_shares(count / 64, threads, [&](int64_t first, int64_t last) {
        uint64_t sums[8] = {};
        for (int64_t line = first; line < last; ++line) {
            uint64_t words[8];
            std::memcpy(words, bytes + 64 * line, 64);
            for (int i = 0; i < 8; ++i) sums[i] += words[i];
        }
        for (const uint64_t sum : sums) total += sum;
    });
    return total;
}

void linear(const Weights& weights, const float* x, int64_t tokens, Act act, float* y, int threads) {
    const Isa& best = isa();
    const Layout& layout = weights.layout;
    const Kernel one = best.choose(weights, act, 1), four = best.choose(weights, act, 4);
    if (!one) throw std::invalid_argument("no kernel for these weights");
    thread_local Buffers buffers;
    best.read_inputs(layout, x, tokens, act, buffers);
    const Inputs inputs = buffers.inputs;
    const auto from = [&](int64_t t) {
        Inputs rest = inputs;
        rest.bytes += t * inputs.columns, rest.lows += t * inputs.columns;
        rest.steps += t * inputs.step_count, rest.sums += t * inputs.groups;
        return rest;
    };
    const int64_t share = tokens > 1 ? std::max<int64_t>(1, cached_bytes / layout.tile_bytes()) : layout.tiles();
    in_shares(layout.tiles(), threads, [&](int64_t first, int64_t last) {
        for (int64_t next; first < last; first = next) {
            next = std::min(last, first + share);
            for (int64_t t = 0; t < tokens;) {
                const bool many = four && t + 4 <= tokens;
                (many ? four : one)(weights, from(t), y + t * layout.rows, layout.rows, first, next);
                t += many ? 4 : 1;
            }
        }
    });
}

}  // namespace bitmill
