// Instruction sets: each is a list of kernels compiled for it; one is chosen at run time.
#pragma once
#include <string>
#include <vector>

#include "lut/levels.h"

namespace bitmill {

enum class Act;          // lut/lookup-inl.h
struct LookupKernels;
struct Buffers;          // lut/inputs-inl.h
struct AdditiveKernels;  // additive/additive.h
struct VectorKernels;    // vector/vector.h
struct RotationKernels;  // rotation/rotation.h
struct SparseKernels;    // sparse/sparse.h
struct FixedKernels;     // fixed/fixed.h
struct StepKernels;      // step/step.h
struct KvKernels;        // kv/kv.h
struct SolveKernels;     // solve/solve.h

struct Isa {
    const char* name;
    const LookupKernels* lookup;
    DecodeRows decode;
    void (*read_inputs)(const Layout& layout, const float* x, int64_t tokens, Act act, Buffers& out);
    const AdditiveKernels* additive;
    const VectorKernels* vector;
    const RotationKernels* rotation;
    const SparseKernels* sparse;
    const FixedKernels* fixed;
    const StepKernels* step;
    const KvKernels* kv;
    const SolveKernels* solve;
};
extern const Isa avx512_isa, amx_isa, avxvnni_isa, avx2_isa, neon_isa, scalar_isa;

// The instruction sets of this machine, best first.
std::vector<std::string> available_isas();

// The selected one: BITMILL_ISA, or the best. Both throw std::invalid_argument for an unavailable one.
const Isa& isa();
void use_isa(const std::string& name);

}  // namespace bitmill
