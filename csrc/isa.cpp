#include "isa.h"

#include <cstdlib>
#include <stdexcept>

#ifdef BITMILL_X86
#include <cpuid.h>
#endif
#ifdef BITMILL_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace bitmill {
namespace {

#if defined(BITMILL_AVXVNNI) || defined(BITMILL_AMX)
bool has_bit(unsigned subleaf, int word, int bit) {  // of cpuid's leaf 7: __builtin_cpu_supports knows names in newer compilers only
    unsigned words[4];
    return __get_cpuid_count(7, subleaf, words, words + 1, words + 2, words + 3) && (words[word] >> bit & 1);
}
#endif
#ifdef BITMILL_AMX
bool has_amx() {  // and Linux lets this process keep tiles
    constexpr int permit = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM
    static const bool found = has_bit(0, 3, 24) && has_bit(0, 3, 25) && syscall(SYS_arch_prctl, permit, tile_data) == 0;
    return found;
}
#endif

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
#if defined(BITMILL_TEST_AMX)
    if (!known.empty()) known.push_back(&amx_isa);
#elif defined(BITMILL_AMX)
    if (!known.empty() && has_amx()) known.push_back(&amx_isa);  // not first: it has never run on a processor
#endif
#endif
#ifdef BITMILL_TEST_AVXVNNI  // tests/sanitize.sh: by the instructions of AVX-512
    if (avx2 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl")) known.push_back(&avxvnni_isa);
#elif defined(BITMILL_AVXVNNI)
    if (avx2 && has_bit(1, 0, 4)) known.push_back(&avxvnni_isa);
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
