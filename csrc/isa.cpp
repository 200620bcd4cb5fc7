#include "isa.h"

#include <cstdlib>
#include <stdexcept>

namespace bitmill {
namespace {

std::vector<const Isa*> machine_isas() {
    std::vector<const Isa*> known;
#ifdef BITMILL_EMULATED_AVX512  // tests/sanitize.sh: on any machine
    known.push_back(&avx512_isa);
#endif
#ifdef BITMILL_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#ifndef BITMILL_WITHOUT_AVX512  // tests/sanitize.sh, where it is not compiled
    if (known.empty() && avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") &&
        __builtin_cpu_supports("avx512vnni"))
        known.push_back(&avx512_isa);
#endif
    if (avx2) known.push_back(&avx2_isa);
#endif
#ifdef BITMILL_ARM
    known.push_back(&neon_isa);
#endif
    known.push_back(&scalar_isa);
    return known;
}

const Isa* find(const std::string& name) {
    std::string names;
    for (const Isa* one : machine_isas()) {
        if (name == one->name) return one;
        names += (names.empty() ? "" : ", ") + std::string(one->name);
    }
    throw std::invalid_argument("the instruction set '" + name + "' is not among those of this machine: " + names);
}

const Isa*& current() {
    static const Isa* chosen = [] {
        const char* name = std::getenv("BITMILL_ISA");
        return name && *name ? find(name) : machine_isas().front();
    }();
    return chosen;
}

}  // namespace

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Isa* one : machine_isas()) names.emplace_back(one->name);
    return names;
}

const Isa& isa() { return *current(); }

void use_isa(const std::string& name) { current() = find(name); }

}  // namespace bitmill
