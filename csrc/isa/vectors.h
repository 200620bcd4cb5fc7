// The instruction set that a source file of this folder is compiled for. CMakeLists.txt compiles each file once for
// every instruction set, with its flags and one of BITMILL_FOR_AVX512, _AVX2, _NEON and _SCALAR defined.
#pragma once
#if defined(BITMILL_FOR_AVX512)
#include "../simd/avx512_streams.h"
#define BITMILL_NAMED(kind) avx512_##kind
namespace bitmill {
using Vectors16 = Avx512;
using VectorStreams = Avx512Streams;
constexpr const char* isa_name = "avx512";
}  // namespace bitmill
#elif defined(BITMILL_FOR_AVX2)
#include "../simd/avx2_streams.h"
#define BITMILL_NAMED(kind) avx2_##kind
namespace bitmill {
using Vectors16 = Avx2;
using VectorStreams = Avx2Streams;
constexpr const char* isa_name = "avx2";
}  // namespace bitmill
#elif defined(BITMILL_FOR_NEON)
#include "../simd/neon_streams.h"
#define BITMILL_NAMED(kind) neon_##kind
namespace bitmill {
using Vectors16 = Neon;
using VectorStreams = NeonStreams;
constexpr const char* isa_name = "neon";
}  // namespace bitmill
#elif defined(BITMILL_FOR_SCALAR)
#include "../simd/scalar_streams.h"
#define BITMILL_NAMED(kind) scalar_##kind
namespace bitmill {
using VectorStreams = ScalarStreams;
constexpr const char* isa_name = "scalar";
}  // namespace bitmill
#else
#error "define the instruction set: see isa/vectors.h"
#endif
